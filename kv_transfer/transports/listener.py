"""A bound ZMQ socket with a thread of its own that outlives every message. Used by all receiving transports."""

import logging
import threading
from collections.abc import Callable

import zmq

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.kv_socket import prepare_for_kv
from protocol.sockets import bind

QUEUED_MESSAGES = 4
"""Messages per peer that ZMQ may hold before this thread has looked at them; a peer that sends more has to wait."""

_QUEUED_ANSWERS = 100_000  # a few bytes each; one that does not fit would be lost
_POLL_MS = 1000
_log = logging.getLogger(__name__)

Handler = Callable[[list[zmq.Frame]], list[bytes] | None]
"""Takes the parts of a message, returns the parts of an answer or None. Called on the listener's thread."""


class Listener:
    """Hands every message to handle. counters: "unreachable_sender" and "internal_error" are counted there.

    Raises zmq.ZMQError when host cannot be bound. A peer that sends a part of more than max_bytes is disconnected.
    """

    def __init__(self, kind: int, host: str, max_bytes: int, handle: Handler, counters: dict[str, int]) -> None:
        self._handle = handle
        self._counters = counters
        self._outgoing: Mailbox[list[bytes] | None] = Mailbox(0)  # None: that was all
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = prepare_for_kv(self._context.socket(kind), max_bytes, QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUED_ANSWERS)
        self.address = bind(self._socket, host)
        self._thread = threading.Thread(target=self._run, name="kv-listener", daemon=True)
        self._thread.start()

    def send(self, parts: list[bytes]) -> None:
        """Send a message, from any thread; one that cannot be delivered is counted."""
        self._outgoing.put(parts)

    def close(self) -> None:
        """End the thread; handle must not be waiting for anything by then."""
        self._outgoing.put(None)
        self._thread.join()
        self._outgoing.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._outgoing.fileno(), zmq.POLLIN)
        while self._send_outgoing():
            if self._socket in dict(poller.poll(_POLL_MS)):
                self._receive()
        self._context.destroy(linger=0)

    def _send_outgoing(self) -> bool:
        """Return whether there will be more."""
        for parts in self._outgoing.take(1):
            if parts is None:
                return False
            self._send(parts)
        return True

    def _send(self, parts: list[bytes]) -> None:
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError:
            self._counters["unreachable_sender"] += 1

    def _receive(self) -> None:
        try:
            answer = self._handle(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
        except zmq.ZMQError:
            self._counters["unreachable_sender"] += 1
        except Exception:
            self._counters["internal_error"] += 1
            _log.exception("a message to %s was dropped", self.address)
        else:
            if answer:
                self._send(answer)
