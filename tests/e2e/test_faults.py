"""What a client sees when something goes wrong in a real cluster of one prefill and one decode worker.

The tests share one cluster and run in the order of this file; the last one stops it.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.cluster_process import ROOT, ClusterProcess, Worker
from tests.e2e.processes import MarkedProcess, wait_for
from worker.dead_man_switch import LEAST_S
from worker.departure import WITHIN_S

LONG = 400
WHOLE_CONTEXT = 1000  # takes longer than LEFT_S
LEFT_S = 2.0
AT_ONCE_S = 3.0
BACK_S = 60.0
STANDS_STILL_S = 4.0  # more than a heartbeat's timeout
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[ClusterProcess]:
    running = ClusterProcess("cpu_1p1d.yaml", model)
    yield running
    running.destroy()


def ask(cluster: ClusterProcess, num_tokens: int = 8, **options: Any) -> Any:
    return cluster.client().completions.create(
        model=cluster.model,
        prompt="Once upon a time",
        max_tokens=num_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
        **options,
    )


BAD_BODIES = {
    "no JSON": (b"{", 400),
    "no object": (b"[]", 400),
    "no prompt": ({}, 400),
    "empty prompt": ({"prompt": []}, 400),
    "prompt of numbers that are no ids": ({"prompt": [1.5]}, 400),
    "negative id": ({"prompt": [-1]}, 400),
    "id beyond the vocabulary": ({"prompt": [1 << 40]}, 400),
    "prompt longer than the context": ({"prompt": [5] * 200_000}, 400),
    "no tokens wanted": ({"prompt": "A", "max_tokens": 0}, 400),
    "temperature below zero": ({"prompt": "A", "temperature": -1}, 400),
    "temperature that is no number": (b'{"prompt": "A", "temperature": NaN}', 400),
    "bias of a token that does not exist": ({"prompt": "A", "logit_bias": {"99999999": 1}}, 400),
    "lone surrogate": (b'{"prompt": "\\ud800"}', 400),
    "another model": ({"prompt": "A", "model": "another"}, 404),
    "five megabytes": ({"prompt": "A" * (5 << 20)}, 413),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_input_is_refused_with_an_error_that_names_it(cluster: ClusterProcess, case: str):
    body, status = BAD_BODIES[case]
    url = f"{cluster.url}/v1/completions"
    if isinstance(body, bytes):
        answer = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=30)
    else:
        answer = httpx.post(url, json={"model": cluster.model, "max_tokens": 4, **body}, timeout=30)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["type"]


@pytest.mark.slow
def test_after_all_bad_input_the_cluster_serves_and_its_pools_are_whole(cluster: ClusterProcess):
    assert ask(cluster).choices[0].finish_reason == "length"
    cluster.wait_until_pools_whole()


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_blocks(cluster: ClusterProcess):
    stream = ask(cluster, WHOLE_CONTEXT, stream=True)
    next(iter(stream))
    wait_for(lambda: cluster.worker("decode")["blocks"]["held"], 2, "its blocks are held")
    stream.close()
    cluster.wait_until_pools_whole(LEFT_S)
    outcomes = [
        line for line in httpx.get(f"{cluster.url}/metrics").text.splitlines() if "tandem_requests_total" in line
    ]
    assert any('outcome="client_gone"' in line for line in outcomes), "it was not aborted: it ran to its end"


@pytest.mark.slow
def test_a_killed_decode_worker_comes_back_and_its_stream_goes_on(cluster: ClusterProcess):
    before = cluster.worker("decode")
    stream = iter(ask(cluster, LONG, stream=True))
    next(stream)
    os.kill(before["pid"], signal.SIGKILL)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert_serves_again(cluster, before)


@pytest.mark.slow
def test_a_killed_prefill_worker_comes_back(cluster: ClusterProcess):
    before = cluster.worker("prefill")
    os.kill(before["pid"], signal.SIGKILL)
    killed_s = time.monotonic()
    answer = httpx.post(f"{cluster.url}/v1/completions", json={"model": cluster.model, "prompt": "A"}, timeout=BACK_S)
    assert answer.status_code in (200, 500, 503)  # it may wait for the next life, or be told that there is none now
    assert time.monotonic() - killed_s < BACK_S
    assert_serves_again(cluster, before)


@pytest.mark.slow
def test_a_stopped_worker_is_killed_and_replaced(cluster: ClusterProcess):
    before = cluster.worker("prefill")
    os.kill(before["pid"], signal.SIGSTOP)
    assert_serves_again(cluster, before)
    assert not Path(f"/proc/{before['pid']}").exists()


@pytest.mark.slow
def test_a_worker_that_hangs_while_its_sockets_live_is_gone_within_seconds_and_comes_back(cluster: ClusterProcess):
    before = cluster.worker("decode")
    stream = iter(ask(cluster, WHOLE_CONTEXT, stream=True))
    next(stream)
    with main_thread_stopped(before["pid"]):
        wait_for(lambda: cluster.worker("decode")["state"] != "ready", LEAST_S + AT_ONCE_S, "it is given up")
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length", "its stream goes on elsewhere"
    assert_serves_again(cluster, before)


@contextmanager
def main_thread_stopped(pid: int) -> Iterator[None]:
    """Hold a process's main thread, and no other, as a debugger would."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(PTRACE_SEIZE, pid, None, None):
        pytest.skip(f"this machine lets nobody hold a thread: {os.strerror(ctypes.get_errno())}")
    libc.ptrace(PTRACE_INTERRUPT, pid, None, None)
    yield
    libc.ptrace(PTRACE_DETACH, pid, None, None)


@pytest.mark.slow
def test_a_worker_that_a_signal_asks_to_end_does_so_and_comes_back(cluster: ClusterProcess):
    before = cluster.worker("prefill")
    os.kill(before["pid"], signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{before['pid']}").exists(), WITHIN_S + AT_ONCE_S, "the process has ended")
    assert_serves_again(cluster, before)


def assert_serves_again(cluster: ClusterProcess, before: Worker) -> None:
    back = cluster.wait_until_back(before, BACK_S)
    assert back["pid"] != before["pid"]
    assert ask(cluster).choices[0].finish_reason == "length"
    cluster.wait_until_pools_whole()


@pytest.mark.slow
def test_a_router_that_stands_still_for_seconds_keeps_its_workers_and_streams(cluster: ClusterProcess):
    before = cluster.workers()
    stream = iter(ask(cluster, WHOLE_CONTEXT, stream=True))
    next(stream)
    router = next(int(name.split()[0]) for name in ours(cluster) if "-m router" in name)
    os.kill(router, signal.SIGSTOP)
    time.sleep(STANDS_STILL_S)
    os.kill(router, signal.SIGCONT)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert [worker["epoch"] for worker in cluster.workers()] == [worker["epoch"] for worker in before]


@pytest.mark.slow
def test_a_terminal_that_closes_lets_a_stream_finish_and_leaves_nothing_behind(cluster: ClusterProcess):
    """All processes of the terminal hear it: Ray's too, as it stands in no session of its own."""
    stream = iter(ask(cluster, LONG, stream=True))
    next(stream)
    os.killpg(cluster.processes.process.pid, signal.SIGHUP)
    reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] == "length"
    assert cluster.processes.wait(40) == 0, cluster.processes.output
    cluster.processes.assert_nothing_left()


def ours(cluster: ClusterProcess) -> list[str]:
    """Return the living processes that are our own program, as against Ray's."""
    return [name for name in cluster.processes.descendants() if "-m router" in name or "-rank0" in name]


@pytest.mark.slow
def test_a_start_that_is_no_longer_wanted_ends_and_leaves_nothing_behind(model: Path):
    command = [sys.executable, "-m", "cluster", "up", "configs/cpu_colocated.yaml"]
    starting = MarkedProcess([*command, "--set", f"model.path={model}", "--set", "router.port=0"], ROOT)
    try:
        starting.wait_for_text("workers ready 0 of 1", 60)
        starting.process.send_signal(signal.SIGINT)
        assert starting.wait(BACK_S) == 0, starting.output
        assert "ready: " not in starting.output
        assert starting.output.endswith("stopped\n")
        starting.assert_nothing_left()
    finally:
        starting.destroy()


@pytest.mark.slow
def test_a_killed_driver_takes_everything_along(model: Path):
    cluster = ClusterProcess("cpu_colocated.yaml", model)
    try:
        assert len(ours(cluster)) == 2, cluster.processes.descendants()
        stream = iter(ask(cluster, WHOLE_CONTEXT, stream=True))
        next(stream)
        cluster.processes.process.kill()
        with pytest.raises(openai.APIError):  # told so by the router, which ends last
            for _ in stream:
                pass
        cluster.processes.process.wait(10)
        cluster.processes.assert_nothing_left(10)
    finally:
        cluster.destroy()


@pytest.mark.slow
def test_a_killed_router_is_reported_and_ends_the_cluster(model: Path):
    cluster = ClusterProcess("cpu_colocated.yaml", model)
    try:
        router = next(name for name in cluster.processes.descendants() if "-m router" in name)
        os.kill(int(router.split()[0]), signal.SIGKILL)
        assert cluster.processes.wait(30) == 1
        assert "the router ended by itself (exit code -9)" in cluster.processes.output
        cluster.processes.assert_nothing_left()
    finally:
        cluster.destroy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "name", "ends_workers"),
    [("raylet/raylet ", "agent on this machine (raylet)", True), ("gcs/gcs_server ", "head", False)],
    ids=["raylet", "head"],
)
def test_a_lost_part_of_ray_is_reported_and_ends_the_cluster_after_its_streams(
    part: str, name: str, ends_workers: bool, model: Path
):
    """Workers end with the raylet, and serve on without the head."""
    cluster = ClusterProcess("cpu_colocated.yaml", model)
    try:
        stream = iter(ask(cluster, LONG, stream=True))
        next(stream)
        process = next(name for name in cluster.processes.descendants() if part in name)
        os.kill(int(process.split()[0]), signal.SIGKILL)
        with pytest.raises(openai.APIError) if ends_workers else nullcontext():
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert cluster.processes.wait(BACK_S) == 1
        assert f"Ray's {name} ended by itself" in cluster.processes.output
        cluster.processes.assert_nothing_left(1)
    finally:
        cluster.destroy()


@pytest.mark.slow
def test_a_broken_weight_file_is_named_and_nothing_stays(model: Path, tmp_path: Path):
    broken = tmp_path / "model"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).symlink_to(path)
    weights = next(broken.glob("*.safetensors"))
    weights.unlink()
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0not a safetensor")
    with pytest.raises(AssertionError, match=r"ended with 1:(.|\n)*did not start: .*safetensors"):
        ClusterProcess("cpu_1p1d.yaml", broken)


@pytest.mark.slow
def test_a_worker_that_cannot_start_for_a_while_is_tried_again_until_it_can(model: Path, tmp_path: Path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(model, folder)
    cluster = ClusterProcess("cpu_colocated.yaml", folder)
    try:
        before = cluster.worker("colocated")
        folder.rename(elsewhere)
        os.kill(before["pid"], signal.SIGKILL)
        cluster.processes.wait_for_text("no such folder; starting it again in 1 s", BACK_S)
        cluster.processes.wait_for_text("no such folder; starting it again in 2 s", BACK_S)
        elsewhere.rename(folder)
        assert_serves_again(cluster, before)
        cluster.tear_down()
    finally:
        cluster.destroy()
