"""The sending side of the zmq transport: one thread that owns one DEALER per destination.

The thread sleeps, and turns calls of the main thread into calls of peers.py, which keeps the books. Payloads are sent
from where they lie. Answers: see zmq_receiver.py.
"""

import threading
import time
from collections.abc import Callable
from functools import partial

import zmq

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.kv_socket import prepare_for_kv
from kv_transfer.transports.peers import Peers
from kv_transfer.transports.transport import OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

QUEUED_FRAMES = 8
"""Frames per destination that ZMQ may hold after this thread has let go of them; they can no longer be dropped."""

_MAX_ANSWER_BYTES = 1024


class _PeerSocket:
    """A DEALER connected to one destination (a PeerSocket)."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        self.pollable = prepare_for_kv(context.socket(zmq.DEALER), _MAX_ANSWER_BYTES, QUEUED_FRAMES)
        self.pollable.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for an address where nobody listens
        self.pollable.connect(address)

    def send(self, parts: list[bytes | memoryview]) -> bool:
        try:
            self.pollable.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes] | None:
        return self.pollable.recv_multipart(zmq.NOBLOCK) if self.pollable.poll(0) else None

    def close(self) -> None:
        self.pollable.close(linger=0)


class ZmqSender:
    """A SendingTransport."""

    def __init__(self, host: str, timeout_s: float) -> None:
        del host  # nothing listens on this side
        self.settled: Mailbox[Settled] = Mailbox(0)
        self._timeout_s = timeout_s
        self._commands: Mailbox[Callable[[], None]] = Mailbox(0)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._peers = Peers(partial(_PeerSocket, self._context), self.settled.put, timeout_s, time.monotonic)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def send(self, frame: OutgoingFrame) -> None:
        self._commands.put(partial(self._peers.add, frame))

    def drop(self, attempt: Attempt) -> None:
        self._commands.put(partial(self._peers.drop, attempt))

    def close_peer(self, epoch: Epoch) -> None:
        self._commands.put(partial(self._peers.close_epoch, epoch))

    def close(self) -> None:
        self._is_closing = True
        self._commands.ring()
        self._thread.join()
        self._commands.close()
        self.settled.close()

    # --- everything below runs on the owner thread --------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            self._wait()
            for command in self._commands.take(1):
                command()
            self._peers.serve()
        self._context.destroy(linger=0)

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._commands.fileno(), zmq.POLLIN)
        for peer in self._peers.peers.values():
            poller.register(peer.socket.pollable, zmq.POLLIN | zmq.POLLOUT if peer.waiting else zmq.POLLIN)
        poller.poll(int(min(1.0, self._timeout_s / 4) * 1000))
