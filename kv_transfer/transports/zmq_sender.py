"""The sending side of the zmq transport: one thread that owns one DEALER per destination.

A socket is opened for the first frame to a destination, and closed for good when the destination's epoch ends or
nothing was answered for timeout_s. Payloads are sent from where they lie. Answers: see zmq_receiver.py.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import zmq

from kv_transfer.frames import encode_header
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.kv_socket import prepare_for_kv
from kv_transfer.transports.transport import DROPPED, RECEIVING_FAULTS, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

QUEUED_FRAMES = 8
"""Frames per destination that ZMQ may hold after this thread has let go of them; they can no longer be dropped."""

_MAX_ANSWER_BYTES = 1024
_log = logging.getLogger(__name__)


class _Peer:
    """One destination: its socket, what waits for it, and what it has not answered yet."""

    def __init__(self, socket: "zmq.Socket[bytes]", address: str) -> None:
        self.socket = prepare_for_kv(socket, _MAX_ANSWER_BYTES, QUEUED_FRAMES)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for an address where nobody listens
        self.socket.connect(address)
        self.waiting: deque[OutgoingFrame] = deque()
        self.unanswered: dict[bytes, OutgoingFrame] = {}
        self.progress_at = time.monotonic()
        self._num_sent = 0

    def add(self, frame: OutgoingFrame) -> None:
        if not self.is_busy:
            self.progress_at = time.monotonic()
        self.waiting.append(frame)

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.unanswered)

    def send_waiting(self) -> None:
        """Send until ZMQ takes no more."""
        try:
            while self.waiting:
                frame = self.waiting[0]
                sequence = self._num_sent.to_bytes(8, "little")
                parts: list[bytes | memoryview] = [sequence, encode_header(frame.header), frame.payload.numpy().data]
                self.socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
                self._num_sent += 1
                self.unanswered[sequence] = self.waiting.popleft()
        except zmq.Again:
            pass

    def answers(self) -> list[Settled]:
        """Return what has been answered; answers that mean nothing are passed over."""
        settled = []
        while self.socket.poll(0):
            parts = self.socket.recv_multipart(zmq.NOBLOCK)
            frame = self.unanswered.pop(parts[0], None)
            if frame:
                settled.append(Settled(frame, _fault_in(parts[-1])))
        if settled:
            self.progress_at = time.monotonic()
        return settled


class ZmqSender:
    """A SendingTransport."""

    def __init__(self, host: str, timeout_s: float) -> None:
        del host  # nothing listens on this side
        self.settled: Mailbox[Settled] = Mailbox(0)
        self._timeout_s = timeout_s
        self._commands: Mailbox[Callable[[], None]] = Mailbox(0)
        self._peers: dict[Destination, _Peer] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def send(self, frame: OutgoingFrame) -> None:
        self._commands.put(partial(self._add, frame))

    def drop(self, attempt: Attempt) -> None:
        self._commands.put(partial(self._drop, attempt))

    def close_peer(self, epoch: Epoch) -> None:
        self._commands.put(partial(self._close_peers_of, epoch))

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
            for destination, peer in list(self._peers.items()):
                self._serve(destination, peer)
        self._context.destroy(linger=0)

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._commands.fileno(), zmq.POLLIN)
        for peer in self._peers.values():
            poller.register(peer.socket, zmq.POLLIN | zmq.POLLOUT if peer.waiting else zmq.POLLIN)
        poller.poll(int(min(1.0, self._timeout_s / 4) * 1000))

    def _serve(self, destination: Destination, peer: _Peer) -> None:
        try:
            for settled in peer.answers():
                self.settled.put(settled)
            peer.send_waiting()
        except Exception as error:
            _log.exception("connection to %s closed after an error", destination.address)
            self._close_peer(destination, str(error))
            return
        if peer.is_busy and time.monotonic() - peer.progress_at > self._timeout_s:
            self._close_peer(destination, f"no answer from {destination.address} for {self._timeout_s:g} s")

    def _add(self, frame: OutgoingFrame) -> None:
        if frame.destination not in self._peers:
            try:
                self._peers[frame.destination] = _Peer(self._context.socket(zmq.DEALER), frame.destination.address)
            except zmq.ZMQError as error:
                self.settled.put(Settled(frame, f"cannot connect to {frame.destination.address}: {error}"))
                return
        self._peers[frame.destination].add(frame)

    def _drop(self, attempt: Attempt) -> None:
        for peer in self._peers.values():
            dropped = [frame for frame in peer.waiting if frame.header.attempt == attempt]
            peer.waiting = deque(frame for frame in peer.waiting if frame.header.attempt != attempt)
            for frame in dropped:
                self.settled.put(Settled(frame, DROPPED))

    def _close_peers_of(self, epoch: Epoch) -> None:
        for destination in [key for key in self._peers if key.epoch == epoch]:
            self._close_peer(destination, "the destination group is gone")

    def _close_peer(self, destination: Destination, fault: str) -> None:
        peer = self._peers.pop(destination)
        peer.socket.close(linger=0)
        for frame in (*peer.unanswered.values(), *peer.waiting):
            self.settled.put(Settled(frame, fault))


def _fault_in(answer: bytes) -> str | None:
    """Return what the peer says is wrong with a frame, in words from the closed set; None when nothing is."""
    if not answer:
        return None
    text = answer.decode(errors="replace")
    return f"refused by the receiver: {text if text in RECEIVING_FAULTS else 'unknown fault'}"
