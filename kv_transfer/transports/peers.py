"""The sending side's books on every destination: what waits, what is not answered yet, when to give up.

One socket per destination, opened for the first frame to it, and closed for good when the destination's epoch ends or
nothing was answered for timeout_s. Every frame is settled exactly once. Used by zmq_sender.py on its thread, and by a
simulator under its own clock: here are no threads, and sockets are whatever the opener returns.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import zmq

from kv_transfer.frames import encode_header
from kv_transfer.transports.transport import DROPPED, RECEIVING_FAULTS, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

_log = logging.getLogger(__name__)


class PeerSocket(Protocol):
    """A connection to one destination. Answers are [sequence number, fault or nothing]."""

    def send(self, parts: list[bytes | memoryview]) -> bool:
        """Send [sequence number, header, payload] without waiting; False when no more is taken for now."""

    def receive(self) -> list[bytes] | None:
        """Return the next answer, None when none has come."""

    def close(self) -> None:
        """Let go at once, of whatever is still under way too."""


SocketT = TypeVar("SocketT", bound=PeerSocket)


class Peer(Generic[SocketT]):
    """One destination: its socket, what waits for it, and what it has not answered yet."""

    def __init__(self, socket: SocketT, now_s: float) -> None:
        self.socket = socket
        self.waiting: deque[OutgoingFrame] = deque()
        self.unanswered: dict[bytes, OutgoingFrame] = {}
        self.progress_at = now_s
        self._num_sent = 0

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.unanswered)

    def add(self, frame: OutgoingFrame, now_s: float) -> None:
        if not self.is_busy:
            self.progress_at = now_s
        self.waiting.append(frame)

    def send_waiting(self) -> None:
        """Send until the socket takes no more."""
        while self.waiting:
            frame = self.waiting[0]
            sequence = self._num_sent.to_bytes(8, "little")
            if not self.socket.send([sequence, encode_header(frame.header), frame.payload.numpy().data]):
                return
            self._num_sent += 1
            self.unanswered[sequence] = self.waiting.popleft()

    def answers(self, now_s: float) -> list[Settled]:
        """Return what has been answered; answers that mean nothing are passed over."""
        settled = []
        while parts := self.socket.receive():
            frame = self.unanswered.pop(parts[0], None)
            if frame:
                settled.append(Settled(frame, _fault_in(parts[-1])))
        if settled:
            self.progress_at = now_s
        return settled


class Peers(Generic[SocketT]):
    """All destinations. open_socket: address -> socket; it may raise zmq.ZMQError. settle: told of every frame once."""

    def __init__(
        self,
        open_socket: Callable[[str], SocketT],
        settle: Callable[[Settled], None],
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._open_socket = open_socket
        self._settle = settle
        self._timeout_s = timeout_s
        self._clock = clock
        self.peers: dict[Destination, Peer[SocketT]] = {}

    def add(self, frame: OutgoingFrame) -> None:
        """Send this frame when its turn comes."""
        destination = frame.destination
        if destination not in self.peers:
            try:
                self.peers[destination] = Peer(self._open_socket(destination.address), self._clock())
            except zmq.ZMQError as error:
                self._settle(Settled(frame, f"cannot connect to {destination.address}: {error}"))
                return
        self.peers[destination].add(frame, self._clock())

    def drop(self, attempt: Attempt) -> None:
        """Do not send those frames of this attempt that still wait."""
        for peer in self.peers.values():
            dropped = [frame for frame in peer.waiting if frame.header.attempt == attempt]
            peer.waiting = deque(frame for frame in peer.waiting if frame.header.attempt != attempt)
            for frame in dropped:
                self._settle(Settled(frame, DROPPED))

    def close_epoch(self, epoch: Epoch) -> None:
        """This destination group is gone."""
        for destination in [key for key in self.peers if key.epoch == epoch]:
            self._close(destination, "the destination group is gone")

    def serve(self) -> None:
        """Take answers, send what can be sent, and give up whom timeout_s has passed for."""
        for destination, peer in list(self.peers.items()):
            self._serve(destination, peer)

    def _serve(self, destination: Destination, peer: Peer[SocketT]) -> None:
        now_s = self._clock()
        try:
            for settled in peer.answers(now_s):
                self._settle(settled)
            peer.send_waiting()
        except Exception as error:
            _log.exception("connection to %s closed after an error", destination.address)
            self._close(destination, str(error))
            return
        if peer.is_busy and now_s - peer.progress_at > self._timeout_s:
            self._close(destination, f"no answer from {destination.address} for {self._timeout_s:g} s")

    def _close(self, destination: Destination, fault: str) -> None:
        peer = self.peers.pop(destination)
        peer.socket.close()
        for frame in (*peer.unanswered.values(), *peer.waiting):
            self._settle(Settled(frame, fault))


def _fault_in(answer: bytes) -> str | None:
    """Return what the peer says is wrong with a frame, in words from the closed set; None when nothing is."""
    if not answer:
        return None
    text = answer.decode(errors="replace")
    return f"refused by the receiver: {text if text in RECEIVING_FAULTS else 'unknown fault'}"
