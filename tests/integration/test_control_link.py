"""A worker's line to the router over real sockets.

A cut, by a proxy between them: both ends find out, and neither forgets. A router that is about to end, or of another
version: its worker understands.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec
import pytest
import zmq

from protocol.codec import encode
from protocol.errors import ConfigError
from protocol.identity import new_attempt, new_epoch
from protocol.messages import PROTOCOL_VERSION, Abort, Join, Progress, Stop, WorkerInfo
from protocol.sockets import bind
from router.control.membership import identity_of
from tests.members import SECRET, member
from worker.control_link import RECONNECT_MS, ControlLink, ControlSocket, Stopped

HOST = "127.0.0.1"


class Proxy:
    """Passes bytes on to a port, both ways, until it is cut; afterwards it lets new connections through again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server((HOST, 0))
        self._ends: list[socket.socket] = []
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"tcp://{HOST}:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        for end in self._ends:
            _shut(end)

    def close(self) -> None:
        _shut(self._listener)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection((HOST, self._port))
            self.num_connections += 1
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    source.close()
    _shut(sink)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def router() -> Iterator[tuple["zmq.Socket[bytes]", Proxy]]:
    with zmq.Context() as context:
        router = member(context, zmq.ROUTER)
        proxy = Proxy(int(bind(router, HOST).rpartition(":")[2]))
        yield router, proxy
        router.close()
        proxy.close()


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def test_after_a_cut_the_worker_stays_away_until_the_router_has_found_out(router) -> None:
    """Were it back at once, an Abort that was lost with the connection would leave its blocks held for ever."""
    router, proxy = router
    info = WorkerInfo("decode", 0, 0, 1, new_epoch(), 1, "node")
    wire = ControlSocket(proxy.address, info, SECRET)
    link = ControlLink(wire, info.epoch)
    link.send(Progress("here"))
    link.flush()
    assert router.recv_multipart()[0] == identity_of(info)
    proxy.cut()
    abort = encode(Abort(new_attempt("r", 0, 1, info.epoch)), 1, info.epoch)

    def is_unreachable() -> bool:
        try:
            router.send_multipart([identity_of(info), abort], zmq.NOBLOCK)
        except zmq.ZMQError:
            return True
        return False

    wait_until(is_unreachable, 2)
    deadline_s = time.monotonic() + RECONNECT_MS / 1000 - 0.5
    while time.monotonic() < deadline_s:
        assert is_unreachable(), "the worker is back before the router's next ping must have missed it"
        time.sleep(0.05)
    link.send(Progress("still here"))
    link.flush()
    assert router.poll(10_000), "the worker did not come back to hear that it is over"
    wire.close()


def test_a_router_that_says_stop_and_closes_at_once_is_understood() -> None:
    info = WorkerInfo("decode", 0, 0, 1, new_epoch(), 1, "node")
    with zmq.Context() as context:
        router = member(context, zmq.ROUTER)
        wire = ControlSocket(bind(router, HOST), info, SECRET)
        link = ControlLink(wire, info.epoch)
        link.send(Progress("here"))
        link.flush()
        router.recv_multipart()
        router.send_multipart([identity_of(info), encode(Stop(), 1, info.epoch)])
        router.close(linger=1000)
    time.sleep(0.1)
    link.send(Progress("still here"))
    link.flush()
    with pytest.raises(Stopped):
        link.receive()
    wire.close()


def test_a_router_of_another_version_ends_the_start_with_both_versions() -> None:
    info = WorkerInfo("decode", 0, 0, 1, new_epoch(), 1, "node")
    with zmq.Context() as context:
        router = member(context, zmq.ROUTER)
        wire = ControlSocket(bind(router, HOST), info, SECRET)
        link = ControlLink(wire, info.epoch)
        link.send(Join(info, "rendezvous"))
        link.flush()
        router.recv_multipart()
        other = msgspec.msgpack.encode([PROTOCOL_VERSION + 1, "nothing", "that", "we know"])
        router.send_multipart([identity_of(info), other])
        versions = f"version {PROTOCOL_VERSION + 1} of the control protocol, this worker version {PROTOCOL_VERSION}"
        with pytest.raises(ConfigError, match=versions):
            link.await_welcome()
        wire.close()
        router.close()
