"""The sending side's books on every destination: what waits, what is not answered yet, when to give up.

A Peer is one destination's connection. It is opened for the first frame, and closed for good when the destination's
epoch ends, its connection fails, or nothing was answered for timeout_s. Every frame is settled exactly once. How bytes
travel is the Peer's business alone: see zmq/sender.py and slab/sender.py. Here are no threads: peer_loop.py calls this
on one at a time, and a simulator under a clock of its own.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from kv_transfer.transports.transport import DROPPED, RECEIVING_FAULTS, REFUSED, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

_log = logging.getLogger(__name__)


class Peer(Protocol):
    """One destination: its connection, what waits for it, and what it has not answered yet."""

    waiting: deque[OutgoingFrame]
    is_stalled: bool  # the connection took less than there was to send
    unanswered: dict[bytes, OutgoingFrame]

    def send_waiting(self) -> None:
        """Send until the connection takes no more. Raises OSError when it is gone."""

    def answers(self) -> list[Settled]:
        """Return what has been answered, without waiting. Raises OSError when the connection is gone."""

    def let_go(self, frame: OutgoingFrame) -> None:
        """The frame will not be sent; it is no longer in waiting."""

    def close(self) -> None:
        """Close the connection."""


PeerT = TypeVar("PeerT", bound=Peer)


class Peers(Generic[PeerT]):
    """All destinations. open_peer may raise OSError: then the frame that wanted it is settled with that.

    settle is told of every frame once; clock returns seconds.
    """

    def __init__(
        self,
        open_peer: Callable[[Destination], PeerT],
        settle: Callable[[Settled], None],
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.num_opened = 0
        self._open_peer = open_peer
        self._settle = settle
        self._timeout_s = timeout_s
        self._clock = clock
        self._peers: dict[Destination, PeerT] = {}
        self._progress_at: dict[Destination, float] = {}

    def __iter__(self) -> Iterator[PeerT]:
        return iter(self._peers.values())

    @property
    def is_busy(self) -> bool:
        """Whether anything waits or is unanswered."""
        return any(peer.waiting or peer.unanswered for peer in self)

    def add(self, frame: OutgoingFrame) -> None:
        """Send this frame when its turn comes."""
        destination = frame.destination
        try:
            peer = self._peers.get(destination) or self._open(destination)
        except (OSError, ValueError) as error:
            self._settle(Settled(frame, f"cannot connect to {destination.address}: {error}"))
            return
        if not (peer.waiting or peer.unanswered):
            self._progress_at[destination] = self._clock()
        peer.waiting.append(frame)

    def send_at_once(self, frame: OutgoingFrame) -> bool:
        """Send this frame, if its destination is connected and nothing waits there; return whether that was so."""
        peer = self._peers.get(frame.destination)
        if peer is None or peer.waiting:
            return False
        self.add(frame)
        self._serve(frame.destination, peer)
        return True

    def drop(self, attempt: Attempt) -> None:
        """Do not send those frames of this attempt that still wait."""
        for peer in self:
            dropped = [frame for frame in peer.waiting if frame.header.attempt == attempt]
            peer.waiting = deque(frame for frame in peer.waiting if frame.header.attempt != attempt)
            for frame in dropped:
                peer.let_go(frame)
                self._settle(Settled(frame, DROPPED))

    def close_epoch(self, epoch: Epoch) -> None:
        """This destination group is gone."""
        for destination in [key for key in self._peers if key.epoch == epoch]:
            self._close(destination, "the destination group is gone")

    def serve(self) -> None:
        """Take answers, send what can be sent, and give up whom timeout_s has passed for."""
        for destination, peer in list(self._peers.items()):
            self._serve(destination, peer)

    def close(self) -> None:
        """Close every connection; what was under way is settled no more."""
        for peer in self:
            peer.close()
        self._peers.clear()

    def _open(self, destination: Destination) -> PeerT:
        peer = self._peers[destination] = self._open_peer(destination)
        self.num_opened += 1
        return peer

    def _serve(self, destination: Destination, peer: PeerT) -> None:
        try:
            answers = peer.answers()
            for settled in answers:
                self._settle(settled)
            peer.send_waiting()
        except Exception as error:
            _log.warning("connection to %s closed: %s", destination.address, error)
            self._close(destination, f"connection to {destination.address} failed: {error}")
            return
        now_s = self._clock()
        if answers or not (peer.waiting or peer.unanswered):
            self._progress_at[destination] = now_s
        elif now_s - self._progress_at[destination] > self._timeout_s:
            self._close(destination, f"no answer from {destination.address} for {self._timeout_s:g} s")

    def _close(self, destination: Destination, fault: str) -> None:
        peer = self._peers.pop(destination)
        del self._progress_at[destination]
        peer.close()
        for frame in (*peer.unanswered.values(), *peer.waiting):
            self._settle(Settled(frame, fault))


def fault_in(answer: bytes) -> str | None:
    """Return what the peer says is wrong with a frame, in words from the closed set; None when nothing is."""
    if not answer:
        return None
    text = answer.decode(errors="replace")
    return REFUSED + (text if text in RECEIVING_FAULTS else "unknown fault")
