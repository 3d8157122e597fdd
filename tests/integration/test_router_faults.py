"""The real router process when things go wrong: clients that leave, workers that die, garbage, and shutting down."""

import contextlib
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
import zmq

from protocol.codec import encode
from protocol.layout import keys_and_values
from protocol.messages import (
    Abort,
    BlockCounts,
    Committed,
    Departing,
    Failed,
    Fence,
    Heartbeat,
    PeerLost,
    Reserve,
    Stop,
    Welcome,
)
from protocol.topology import RouterSection
from router.control.course import MAX_CRASHES
from router.launch import GroupSpec, RouterLaunch
from tests.integration.fake_worker import LAYOUT, FakeWorker
from tests.integration.router_process import (
    ONE_PAIR,
    REPOSITORY,
    RouterUnderTest,
    counted,
    drops,
    wait_until,
    write_model,
)
from tests.members import SECRET, member

LONG = {"prompt": "one two three", "max_tokens": 500}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def router(folder: Path) -> Iterator[RouterUnderTest]:
    with RouterUnderTest(folder) as router:
        yield router


@pytest.fixture
def prefill(router: RouterUnderTest) -> Iterator[FakeWorker]:
    with FakeWorker(router.control, "prefill") as worker:
        yield worker


@pytest.fixture
def decode(router: RouterUnderTest) -> Iterator[FakeWorker]:
    with FakeWorker(router.control, "decode", step_s=0.02) as worker:
        yield worker


def connect(router: RouterUnderTest, body: dict[str, object], times: int = 1) -> socket.socket:
    """Send a request, or several before the first is answered, on a socket of our own, to close when we like."""
    host, port = router.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    data = json.dumps(body).encode()
    raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data) * times)
    return raw


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefilled", "decoding"])
def test_a_client_that_leaves_frees_both_sides_within_a_second(
    router, prefill, decode, stage: str, stream: bool
) -> None:
    router.await_ready()
    prefill.is_prefilling = stage != "queued"
    decode.is_granting = stage == "decoding"
    raw = connect(router, {**LONG, "stream": stream})
    wait_until(lambda: len(decode.messages(Reserve)) == 1)
    if stage == "decoding":
        wait_until(lambda: len(prefill.messages(Committed)) == 1)
    time.sleep(0.05)
    raw.close()
    holders = [decode] if stage == "decoding" else [prefill, decode]
    took_s = wait_until(lambda: all(len(worker.messages(Abort)) == 1 for worker in holders))
    assert took_s < 1
    wait_until(lambda: router.status()["requests"] == 0, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_with_several_requests_on_one_connection_frees_what_runs(
    router, prefill, decode, stream: bool
) -> None:
    router.await_ready()
    raw = connect(router, {**LONG, "stream": stream}, times=3)
    wait_until(lambda: len(prefill.messages(Committed)) == 1)
    raw.close()
    wait_until(lambda: router.status()["requests"] == 0, 1)
    wait_until(lambda: len(decode.messages(Abort)) > 0)
    assert len(decode.messages(Reserve)) == len(decode.messages(Abort)) == 1
    assert counted(router, "tandem_requests", "outcome") == {"client_gone": 1}
    assert "Traceback" not in router.log.read_text()


def test_a_stream_whose_worker_dies_goes_on_when_another_has_come_and_its_client_sees_a_pause(
    router, prefill, decode
) -> None:
    router.await_ready()
    whole = {"prompt": "one two three", "max_tokens": 60, "return_token_ids": True}
    expected = router.client.post("/v1/completions", json=whole).json()
    frames: list[dict] = []

    def read() -> None:
        body = {**whole, "stream": True, "stream_options": {"include_usage": True}}
        with router.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
            frames.extend(json.loads(line) for line in lines if line != "[DONE]")

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: len(prefill.messages(Committed)) == 2)
    time.sleep(0.1)
    decode.die()
    wait_until(lambda: prefill.messages(PeerLost) == [PeerLost(decode.epoch)], 2)
    states = {worker["epoch"]: worker["state"] for worker in router.status()["workers"]}
    assert states == {f"{decode.epoch:x}": "dead", f"{prefill.epoch:x}": "ready"}
    assert "no decode worker is ready" in router.client.get("/ready").text
    with FakeWorker(router.control, "decode") as again:
        router.await_ready()
        states = {worker["epoch"]: worker["state"] for worker in router.status()["workers"]}
        assert states == {f"{again.epoch:x}": "ready", f"{prefill.epoch:x}": "ready"}
        reader.join(10)
        assert len(again.messages(Reserve)) == 1
    choices = [choice for frame in frames for choice in frame["choices"]]
    assert [token for choice in choices for token in choice["token_ids"]] == expected["choices"][0]["token_ids"]
    assert "".join(choice["text"] for choice in choices) == expected["choices"][0]["text"]
    assert frames[-1]["usage"] == expected["usage"]
    assert counted(router, "tandem_requests_continued", "reason") == {"worker_lost": 1}


def test_an_error_before_the_first_token_is_a_status_that_says_whether_to_retry(router, prefill, decode) -> None:
    router.await_ready()
    prefill.is_prefilling = decode.is_granting = False
    answers: list[httpx.Response] = []
    body = {**LONG, "stream": True}
    asker = threading.Thread(target=lambda: answers.append(router.client.post("/v1/completions", json=body)))
    asker.start()
    wait_until(lambda: len(decode.messages(Reserve)) == 1)
    attempt = decode.messages(Reserve)[0].attempt
    decode.say(Failed(attempt, "kv_cache_too_small", "17 blocks are needed, 4 exist"))
    asker.join(5)
    assert (answers[0].status_code, answers[0].headers["x-should-retry"]) == (500, "false")
    assert answers[0].json()["error"]["code"] == "kv_cache_too_small"
    wait_until(lambda: len(prefill.messages(Abort)) == 1)
    assert counted(router, "tandem_requests", "outcome") == {"kv_cache_too_small": 1}
    assert "500" not in counted(router, "tandem_rejected", "status"), "it had become a request"


def test_every_call_that_is_refused_is_counted_by_its_status(router) -> None:
    assert router.client.get("/nowhere").status_code == 404
    assert router.client.get("/v1/completions").status_code == 405
    assert router.client.post("/v1/completions", content=b"{").status_code == 400
    assert router.client.get("/health", headers={f"x-{number}": "1" for number in range(70)}).status_code == 400
    assert router.client.post("/v1/completions", json=LONG).status_code == 503
    assert counted(router, "tandem_rejected", "status") == {"404": 1, "405": 1, "400": 2, "503": 1}


def test_the_official_client_raises_on_an_error_in_the_middle_of_a_stream(router, prefill, decode) -> None:
    router.await_ready()
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="one two", max_tokens=400, stream=True)
        next(stream)
        wait_until(lambda: decode.messages(Reserve))
        decode.say(Failed(decode.messages(Reserve)[0].attempt, "model_output_invalid", "it is not finite"))
        with pytest.raises(openai.APIError, match="it is not finite"):
            list(stream)


def test_a_request_that_ends_every_worker_it_meets_is_quarantined_and_the_official_client_asks_no_more(
    router, prefill
) -> None:
    """Each decode worker dies of it; with the client's own retries it would go on for ever."""
    deaths = 0
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none") as client:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.completions.create, model="tiny", prompt="one two", max_tokens=9)
            while not answer.done():
                with FakeWorker(router.control, "decode", step_s=30) as decode:
                    wait_until(lambda: decode.next_index or answer.done(), 10)
                    time.sleep(0.1)
                    deaths += bool(decode.next_index)
        with pytest.raises(openai.InternalServerError, match="lost while they computed this request"):
            answer.result()
        assert deaths == MAX_CRASHES + 1
        with FakeWorker(router.control, "decode"):
            router.await_ready()
            with pytest.raises(openai.InternalServerError, match="not tried again for"):
                client.completions.create(model="tiny", prompt="one two", max_tokens=5)
            other = client.completions.create(model="tiny", prompt="two one", max_tokens=2)
            assert other.choices[0].finish_reason == "length"


def test_losing_one_rank_fences_its_group(folder: Path) -> None:
    layout = msgspec.structs.replace(LAYOUT, tensor_parallel=2)
    with (
        RouterUnderTest(folder, (GroupSpec("prefill", 0, 2), GroupSpec("decode", 0))) as router,
        FakeWorker(router.control, "prefill", 0, 1, layout) as follower,
        FakeWorker(router.control, "prefill", 0, 0, layout, is_assembling=False) as leader,
        FakeWorker(router.control, "decode") as decode,
    ):
        wait_until(lambda: len(follower.messages(Welcome)) == 1)
        assert router.client.get("/ready").status_code == 503
        leader.become_ready()
        router.await_ready()
        follower.die()
        wait_until(lambda: isinstance(leader.ended_by, Fence), 1)
        assert "rank 1" in leader.ended_by.reason
        wait_until(lambda: decode.messages(PeerLost) == [PeerLost(leader.epoch)], 1)


def test_groups_that_do_not_fit_together_are_named_with_both_values(router, prefill) -> None:
    other = msgspec.structs.replace(LAYOUT, planes=keys_and_values(2, 16, "float32"))
    reason = "KV geometry differs: 2 x 8 float32 + 2 x 8 float32 and 2 x 16 float32 + 2 x 16 float32"
    with FakeWorker(router.control, "decode", layout=other):
        wait_until(lambda: reason in router.client.get("/ready").text)
        answer = router.client.post("/v1/completions", json=LONG)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert reason in answer.json()["error"]["message"]


def test_a_prompt_that_no_group_can_hold_is_refused_and_output_is_cut_to_what_fits(router, prefill) -> None:
    with FakeWorker(router.control, "decode", num_tokens=32):
        router.await_ready()
        answer = router.client.post("/v1/completions", json={"prompt": [5] * 40, "max_tokens": 4})
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "is 32 tokens" in answer.json()["error"]["message"]
        answer = router.client.post("/v1/completions", json={"prompt": [5] * 20, "max_tokens": 100})
        assert answer.json()["usage"]["completion_tokens"] == 12


def test_garbage_on_the_control_socket_is_counted_and_changes_nothing(router, prefill, decode) -> None:
    router.await_ready()
    prefill.say_bytes(b"")
    prefill.say_bytes(b"\xc1" * 1000)
    prefill.say(Heartbeat(BlockCounts(), 0, 0, 0), epoch=decode.epoch)
    with zmq.Context() as context, member(context, zmq.DEALER) as stranger:
        stranger.connect(router.control)
        stranger.send_multipart([b"a", b"b", b"c"])
        stranger.send(b"\xff" * 100_000)
        stranger.send(encode(Stop(), 77))
        assert stranger.poll(5000), "a stranger is told that it has no place here"
        wait_until(lambda: drops(router).get("malformed", 0) == 4)
    assert drops(router) == {"malformed": 4, "wrong_identity": 1, "dead_epoch": 1}
    answer = router.client.post("/v1/completions", json={"prompt": "one two", "max_tokens": 2})
    assert answer.json()["choices"][0]["text"] == "one two"


def test_after_a_rush_of_clients_that_come_and_leave_nothing_is_left_and_the_counts_add_up(router) -> None:
    rng = random.Random(7)
    with (
        FakeWorker(router.control, "prefill", 0),
        FakeWorker(router.control, "decode", 0, step_s=0.002),
    ):
        router.await_ready()
        leavers, readers = [], []
        for number in range(200):
            body = {"prompt": [5, 6, 7], "max_tokens": rng.randint(1, 60), "stream": number % 2 == 0}
            (leavers if rng.random() < 0.5 else readers).append(connect(router, body))
            if leavers and rng.random() < 0.4:
                leavers.pop(rng.randrange(len(leavers))).close()
        for raw in leavers:
            raw.close()
        for raw in readers:
            answer = raw.recv(65536)
            while b"[DONE]" not in answer and b"completion_tokens" not in answer:
                assert answer.startswith(b"HTTP/1.1 200")
                answer += raw.recv(65536)
            raw.close()
        wait_until(lambda: router.status()["requests"] == 0)
        metrics = router.client.get("/metrics").text.splitlines()
    ends = {
        line.split('outcome="')[1].split('"')[0]: line for line in metrics if line.startswith("tandem_requests_total")
    }
    assert set(ends) == {"length", "client_gone"}
    started = next(line for line in metrics if line.startswith("vllm:request_prompt_tokens_count"))
    num_started = float(started.split()[-1])  # whoever left before the body was read has started nothing
    assert sum(float(line.split()[-1]) for line in ends.values()) == num_started
    assert len(readers) < num_started <= 200


def test_a_request_ends_at_its_deadline(folder: Path) -> None:
    with (
        RouterUnderTest(folder, timeout_s=0.3) as router,
        FakeWorker(router.control, "prefill") as prefill,
        FakeWorker(router.control, "decode", step_s=0.05) as decode,
    ):
        router.await_ready()
        answer = router.client.post("/v1/completions", json=LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        wait_until(lambda: len(decode.messages(Abort)) == 1, 1)
        assert prefill.messages(Abort) == []


@pytest.mark.parametrize("how", ["SIGTERM", "end of stdin"])
def test_draining_finishes_what_runs_refuses_what_is_new_and_stops_the_workers(
    router, prefill, decode, how: str
) -> None:
    router.await_ready()
    answers: list[httpx.Response] = []
    body = {"prompt": "one two", "max_tokens": 40, "stream": True}
    asker = threading.Thread(target=lambda: answers.append(router.client.post("/v1/completions", json=body)))
    asker.start()
    wait_until(lambda: len(prefill.messages(Committed)) == 1)
    if how == "SIGTERM":
        router.process.send_signal(signal.SIGTERM)
    else:
        router.process.stdin.close()
    wait_until(lambda: router.client.get("/ready").status_code == 503, 2)
    refused = router.client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert {worker["state"] for worker in router.status()["workers"]} == {"draining"}
    asker.join(5)
    assert answers[0].text.endswith("data: [DONE]\n\n")
    assert router.process.wait(5) == 0
    wait_until(lambda: isinstance(prefill.ended_by, Stop) and isinstance(decode.ended_by, Stop), 2)


def test_what_does_not_finish_within_the_grace_ends_in_a_clear_error(folder: Path) -> None:
    with (
        RouterUnderTest(folder, grace_s=0.3) as router,
        FakeWorker(router.control, "prefill"),
        FakeWorker(router.control, "decode", step_s=0.05) as decode,
    ):
        router.await_ready()
        with router.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            router.process.terminate()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        wait_until(lambda: decode.messages(Abort), 2)
        assert router.process.wait(5) == 0


def test_a_second_signal_ends_the_router_at_once(folder: Path) -> None:
    with (
        RouterUnderTest(folder, grace_s=60.0) as router,
        FakeWorker(router.control, "prefill"),
        FakeWorker(router.control, "decode", step_s=1.0),
    ):
        router.await_ready()
        raw = connect(router, LONG)
        wait_until(lambda: router.status()["requests"] == 1)
        router.process.terminate()
        wait_until(lambda: router.client.get("/ready").status_code == 503)
        router.process.terminate()
        assert router.process.wait(2) != 0
        raw.close()


def launch_bytes(folder: Path, **changed: object) -> bytes:
    launch = RouterLaunch(
        section=RouterSection(port=0),
        control_host="127.0.0.1",
        model_folder=str(folder),
        model_name="tiny",
        max_context=64,
        vocab_size=100,
        groups=ONE_PAIR,
        secret=SECRET,
    )
    return msgspec.json.encode(msgspec.structs.replace(launch, **changed)) + b"\n"


def run_router(line: bytes) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "router"], input=line, capture_output=True, timeout=20, cwd=REPOSITORY, check=False
    )
    return done.returncode, done.stderr.decode()


def test_a_port_in_use_is_a_clear_message_and_exit_status_2(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = run_router(launch_bytes(folder, section=RouterSection(port=port)))
    assert code == 2
    assert f"router.port {port}: Address already in use" in said
    assert "Traceback" not in said


def test_a_launch_that_cannot_work_is_a_clear_message_and_exit_status_2(folder: Path) -> None:
    for line, complaint in (
        (b"", "RouterLaunch"),
        (b"{}\n", "missing required field"),
        (launch_bytes(folder, model_folder="/no/such/folder"), "/no/such/folder is not a folder"),
        (launch_bytes(folder, control_host="203.0.113.9"), "cannot be bound to 203.0.113.9"),
        (launch_bytes(folder, groups=(GroupSpec("prefill", 0),)), "prefill and decode, or of colocated"),
    ):
        code, said = run_router(line)
        assert (code, complaint in said, "Traceback" in said) == (2, True, False), said


def test_more_clients_and_ranks_may_connect_than_a_process_may_have_files_by_default(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))  # inherited
    try:
        router = RouterUnderTest(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with router, contextlib.ExitStack() as clients:
        for _ in range(200):
            clients.enter_context(connect(router, LONG))
        assert router.client.get("/health").status_code == 200


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_asked_to_end_loses_no_stream_and_is_no_crash(folder: Path, rank: int) -> None:
    """A rank of a group of two says so; both are told to end, and the stream goes on in the other group."""
    layout = msgspec.structs.replace(LAYOUT, tensor_parallel=2)
    specs = (GroupSpec("prefill", 0), GroupSpec("decode", 0, 2), GroupSpec("decode", 1))
    with (
        RouterUnderTest(folder, specs) as router,
        FakeWorker(router.control, "prefill"),
        FakeWorker(router.control, "decode", 0, 1, layout) as follower,
        FakeWorker(router.control, "decode", 0, 0, layout, is_assembling=False, step_s=0.01) as leader,
    ):
        wait_until(lambda: follower.messages(Welcome))
        leader.become_ready()
        router.await_ready()
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": "one two", "max_tokens": 100, "return_token_ids": True}
            answer = pool.submit(router.client.post, "/v1/completions", json=body)
            wait_until(lambda: leader.next_index)
            with FakeWorker(router.control, "decode", 1):
                wait_until(lambda: router.status()["workers"][2]["state"] == "ready")
                (leader, follower)[rank].say(Departing())
                ids = answer.result(10).json()["choices"][0]["token_ids"]
        assert ids == (ids[:2] * 50)
        wait_until(lambda: isinstance(leader.ended_by, Fence) and isinstance(follower.ended_by, Fence), 1)
        assert counted(router, "tandem_requests_continued", "reason") == {"worker_leaving": 1}


def test_ready_means_that_something_gets_through_every_group(folder: Path) -> None:
    """A decode worker that grants nothing is there, but serves nobody; once it does, a canary gets through."""
    with (
        RouterUnderTest(folder, (GroupSpec("prefill", 0), GroupSpec("decode", 0)), canary_s=0.4) as router,
        FakeWorker(router.control, "prefill"),
        FakeWorker(router.control, "decode") as decode,
    ):
        decode.is_granting = False
        wait_until(lambda: decode.messages(Reserve))
        assert "got through prefill group 0 and decode group 0 yet" in router.client.get("/ready").text
        decode.is_granting = True
        router.await_ready()
        decode.is_granting = False
        wait_until(lambda: router.client.get("/ready").status_code == 503, 10)
        assert counted(router, "tandem_requests", "outcome") == {}, "canaries are no client's requests"
