"""The router's control socket: strangers are not heard, and neither they nor a member that runs wild fill its memory.

One real router, fake workers that stream, and whoever else connects. That the router still stands, its memory stays
and a stream goes on is asked after each.
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from protocol.codec import MAX_REPORT_BYTES, encode
from protocol.identity import new_epoch
from protocol.messages import BlockCounts, Heartbeat, Join, WorkerInfo
from protocol.secret import new_secret
from protocol.sockets import require_key
from router.control.membership import identity_of
from tests.integration.fake_worker import FakeWorker
from tests.integration.router_process import RouterUnderTest, drops, wait_until, write_model
from tests.members import SECRET, member

PROMPT = [5, 6, 7]
NUM_GREETING, NUM_HELLO = 64, 202
"""Bytes of what a client of CURVE says first, and then."""
Context = zmq.Context["zmq.Socket[bytes]"]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterUnderTest]:
    with RouterUnderTest(write_model(tmp_path_factory.mktemp("model"))) as router:
        yield router


@pytest.fixture
def prefill(router: RouterUnderTest) -> Iterator[FakeWorker]:
    with FakeWorker(router.control, "prefill") as worker:
        yield worker


@pytest.fixture
def decode(router: RouterUnderTest) -> Iterator[FakeWorker]:
    with FakeWorker(router.control, "decode", step_s=0.02) as worker:
        yield worker


@pytest.fixture
def unharmed(router: RouterUnderTest, prefill: FakeWorker, decode: FakeWorker) -> Iterator[None]:
    """A stream that runs while a test does its worst; afterwards it ends well, and nothing was heard or kept."""
    wait_until(lambda: serving(router) == {prefill.epoch, decode.epoch})
    answers: list[dict[str, object]] = []
    body = {"prompt": PROMPT, "max_tokens": 99, "return_token_ids": True}  # two seconds
    asker = threading.Thread(target=lambda: answers.append(router.client.post("/v1/completions", json=body).json()))
    dropped, before_mb = drops(router), memory_mb(router)
    asker.start()
    yield
    asker.join(20)
    assert [answer["choices"][0]["token_ids"] for answer in answers] == [PROMPT * 33], answers
    assert prefill.ended_by is decode.ended_by is None
    assert drops(router) == dropped
    assert memory_mb(router) - before_mb < 30


def serving(router: RouterUnderTest) -> set[int]:
    return {int(worker["epoch"], 16) for worker in router.status()["workers"] if worker["state"] == "ready"}


def memory_mb(router: RouterUnderTest) -> int:
    lines = Path(f"/proc/{router.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))


def join_as(epoch: int) -> Join:
    return Join(WorkerInfo("decode", 0, 0, 1, epoch, 1, "evil"), "127.0.0.1:1")


def without_a_key(stranger: "zmq.Socket[bytes]") -> None:
    """As anybody who has found the port."""


def with_a_key_of_no_cluster(stranger: "zmq.Socket[bytes]") -> None:
    require_key(stranger, bytes(32))


def with_another_clusters_key(stranger: "zmq.Socket[bytes]") -> None:
    require_key(stranger, new_secret().key("control"))


def with_the_key_of_another_door(stranger: "zmq.Socket[bytes]") -> None:
    require_key(stranger, SECRET.key("orders"))


STRANGERS = [without_a_key, with_a_key_of_no_cluster, with_another_clusters_key, with_the_key_of_another_door]


@pytest.mark.usefixtures("unharmed")
def test_whoever_has_not_the_clusters_key_can_neither_speak_nor_listen(router: RouterUnderTest) -> None:
    with Context() as context, contextlib.ExitStack() as sockets:
        strangers = [sockets.enter_context(context.socket(zmq.DEALER)) for _ in STRANGERS]
        for stranger, prepare in zip(strangers, STRANGERS, strict=True):
            prepare(stranger)
            epoch = new_epoch()
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.setsockopt(zmq.IDENTITY, identity_of(join_as(epoch).worker))
            stranger.connect(router.control)
            stranger.send(encode(join_as(epoch), epoch))
        time.sleep(1)
        assert not any(stranger.poll(0) for stranger in strangers)


class Tap:
    """Passes one connection on to the router until the worker hangs up, and keeps what the worker said."""

    def __init__(self, control: str) -> None:
        self.heard = b""
        self._control = control
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._pass, daemon=True).start()

    def _pass(self) -> None:
        with self._listener, self._listener.accept()[0] as near, connect_to(self._control) as far:
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    self.heard += data if source is near else b""
                    (far if source is near else near).sendall(data)


def heard_after(connection: socket.socket, data: bytes) -> bytes:
    """Send data; return what is answered, nothing when the other end hangs up."""
    connection.sendall(data)
    time.sleep(0.2)
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(65536)
    return b""


def connect_to(control: str) -> socket.socket:
    host, _, port = control.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def test_what_a_member_has_said_cannot_be_said_again_by_who_listened(router: RouterUnderTest, prefill) -> None:
    tap = Tap(router.control)
    with FakeWorker(tap.address, "decode") as decode:
        router.await_ready()
        wait_until(lambda: len(tap.heard) > 2000)
        dropped = drops(router)
        with connect_to(router.control) as replayed:
            assert heard_after(replayed, tap.heard[:NUM_GREETING]), "the router's greeting"
            assert heard_after(replayed, tap.heard[NUM_GREETING:][:NUM_HELLO]), "the router's half of the handshake"
            assert heard_after(replayed, tap.heard[NUM_GREETING + NUM_HELLO :]) == b"", "it hangs up"
        assert drops(router) == dropped
        assert decode.ended_by is None
        assert encode(Heartbeat(BlockCounts(100, 90, 0, 10), 0, 0, 7), 1)[4:40] not in tap.heard, "all is encrypted"


def flood(control: str, prepare: Callable[["zmq.Socket[bytes]"], None], seconds: float) -> None:
    """Send junk on connections that come and go, from several threads, for so long."""
    until_s = time.monotonic() + seconds

    def come_and_go() -> None:
        with Context() as context:
            while time.monotonic() < until_s:
                with context.socket(zmq.DEALER) as stranger:
                    prepare(stranger)
                    stranger.setsockopt(zmq.LINGER, 0)
                    stranger.setsockopt(zmq.SNDHWM, 60_000)
                    stranger.connect(control)
                    with contextlib.suppress(zmq.Again):
                        for _ in range(60_000):
                            stranger.send(b"x" * 10, zmq.NOBLOCK)
                    time.sleep(0.1)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("unharmed")
def test_junk_of_strangers_that_come_and_go_harms_nobody(router: RouterUnderTest) -> None:
    flood(router.control, without_a_key, seconds=1.5)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
HALVES = (b"", b"\xff", GREETING, GREETING + b"\x04\x64\x05HELLO", b"GET / HTTP/1.1\r\n\r\n", bytes(100_000))
LONG_FRAME = GREETING + b"\x06" + MAX_REPORT_BYTES.to_bytes(8, "big") + bytes(MAX_REPORT_BYTES - 1)
OVERLONG_FRAME = GREETING + b"\x06" + (1 << 40).to_bytes(8, "big") + bytes(1 << 20)


@pytest.mark.usefixtures("unharmed")
def test_handshakes_that_are_begun_and_left_harm_nobody(router: RouterUnderTest) -> None:
    with contextlib.ExitStack() as connections:
        for half in (*(HALVES * 50), *([LONG_FRAME, OVERLONG_FRAME] * 50)):
            connection = connections.enter_context(connect_to(router.control))
            with contextlib.suppress(OSError):  # the router hangs up on some
                connection.sendall(half)
        time.sleep(0.5)


def large_heartbeat(num_bytes: int) -> Heartbeat:
    return Heartbeat(BlockCounts(), 0, 0, 0, {f"{index:07d}": 0 for index in range(num_bytes // 9)})


def grown_by_wild_member(router: RouterUnderTest, num_bytes: int) -> int:
    """Join as decode and send heartbeats of such a size as fast as can be, for two seconds.

    Return by how many MB the router's memory has grown at most.
    """
    info = WorkerInfo("decode", 0, 0, 1, new_epoch(), 1, "wild")
    data = encode(large_heartbeat(num_bytes), info.epoch)
    before_mb = most_mb = memory_mb(router)
    until_s = time.monotonic() + 2
    with Context() as context, member(context, zmq.DEALER) as socket:
        socket.setsockopt(zmq.IDENTITY, identity_of(info))
        socket.setsockopt(zmq.SNDHWM, 4)
        socket.connect(router.control)
        socket.send(encode(Join(info, "127.0.0.1:1"), info.epoch))
        while time.monotonic() < until_s:
            if socket.poll(10, zmq.POLLOUT):
                socket.send(data)
            most_mb = max(most_mb, memory_mb(router))
    return most_mb - before_mb


def test_a_member_whose_messages_are_too_long_is_cut_off(router: RouterUnderTest, prefill) -> None:
    assert grown_by_wild_member(router, 9 << 20) < 60
    wait_until(lambda: serving(router) == {prefill.epoch})


def test_a_member_that_says_more_than_can_be_read_is_read_no_longer(router: RouterUnderTest, prefill) -> None:
    assert grown_by_wild_member(router, MAX_REPORT_BYTES - 1000) < 200
    assert drops(router)["too_much"] > 0
    assert serving(router) == {prefill.epoch}
    with FakeWorker(router.control, "decode"):
        router.await_ready()


def test_members_that_leave_in_the_middle_of_a_flood_do_not_end_the_router(router: RouterUnderTest) -> None:
    """A socket with heartbeats that had stopped reading would abort the process here."""
    flood(router.control, lambda each: require_key(each, SECRET.key("control")), seconds=3)
    wait_until(lambda: router.client.get("/health").status_code == 200)
