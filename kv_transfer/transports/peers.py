"""The sending side's books on every destination: what waits, what is not answered yet, when to try again or give up.

A Peer is one connection to a destination. It is opened for the first frame. Where it breaks, or nothing is answered
over it for a while, a fresh one takes its place, over which everything that was not answered goes once more: receivers
know frames by their place in the plan, so one that comes twice does no harm. When nothing was answered for timeout_s,
when the receiver refuses, or when its group is gone, what is under way is settled with that. Every frame is settled
exactly once.

How bytes travel is the Peer's business alone: see the transports' sender.py. Here are no threads: peer_loop.py calls
this on one at a time, and a simulator under a clock of its own.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from kv_transfer.handshake import RefusedError
from kv_transfer.transports.transport import DROPPED, RECEIVING_FAULTS, REFUSED, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

PATIENCE_S = 1.5
"""How long a connection may be silent before a fresh one is tried: the first time, and then twice as long each."""

_log = logging.getLogger(__name__)


class Peer(Protocol):
    """One connection to one destination, open or about to be."""

    @property
    def is_open(self) -> bool:
        """Whether frames leave at once, so that their answers may be waited for."""

    @property
    def is_stalled(self) -> bool:
        """Whether the connection took less than there was to send."""

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame | None:
        """Send a frame that is whole; return it as it left, None when it cannot leave now. Raises OSError."""

    def answers(self) -> list[tuple[int, bytes]]:
        """Go on with what is under way, and return what was said of which frame, without waiting.

        Raises OSError when the connection is gone, RefusedError when the receiver does not want it.
        """

    def let_go(self, frame: OutgoingFrame) -> None:
        """This frame was answered, or will not be sent: nobody reads its payload any more."""

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        """Return a frame as it can be sent over another connection when this one is closed."""

    def close(self) -> None:
        """Close the connection."""


PeerT = TypeVar("PeerT", bound=Peer)


@dataclass
class _Lane(Generic[PeerT]):
    """One destination: its frames, oldest first, and its connection, None while a broken one is not replaced.

    unanswered: by sequence number. progress_at: when it was last idle or answered. patience_s, and impatient_at: when a
    fresh connection is tried.
    """

    destination: Destination
    progress_at: float
    impatient_at: float
    patience_s: float
    peer: PeerT | None = None
    waiting: deque[OutgoingFrame] = field(default_factory=deque)
    unanswered: dict[int, OutgoingFrame] = field(default_factory=dict)
    num_sent: int = 0
    fault: str = ""

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.unanswered)


class Peers(Generic[PeerT]):
    """All destinations. open_peer, given the first frame, may raise OSError or ValueError: nobody can be there.

    settle is told of every frame once; clock returns seconds.
    """

    def __init__(
        self,
        open_peer: Callable[[OutgoingFrame], PeerT],
        settle: Callable[[Settled], None],
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.num_opened = 0
        self._open_peer = open_peer
        self._settle = settle
        self._timeout_s = timeout_s
        self._patience_s = min(PATIENCE_S, timeout_s / 4)
        self._clock = clock
        self._lanes: dict[Destination, _Lane[PeerT]] = {}

    def __iter__(self) -> Iterator[PeerT]:
        return (lane.peer for lane in self._lanes.values() if lane.peer is not None)

    @property
    def is_busy(self) -> bool:
        """Whether anything waits or is unanswered."""
        return any(lane.is_busy for lane in self._lanes.values())

    def add(self, frame: OutgoingFrame) -> None:
        """Send this frame when its turn comes."""
        lane = self._lanes.get(frame.destination) or self._new_lane(frame.destination)
        was_busy = lane.is_busy
        lane.waiting.append(frame)
        if not was_busy:
            lane.progress_at = self._clock()
            lane.impatient_at = lane.progress_at + lane.patience_s
            if lane.peer is None:
                self._connect(lane)

    def send_at_once(self, frame: OutgoingFrame) -> bool:
        """Send this frame, if its destination is connected and nothing waits there; return whether that was so."""
        lane = self._lanes.get(frame.destination)
        if lane is None or lane.peer is None or lane.waiting:
            return False
        self.add(frame)
        self._serve(lane)
        return True

    def drop(self, attempt: Attempt) -> None:
        """Do not send those frames of this attempt that still wait."""
        for lane in self._lanes.values():
            dropped = [frame for frame in lane.waiting if frame.header.attempt == attempt]
            lane.waiting = deque(frame for frame in lane.waiting if frame.header.attempt != attempt)
            for frame in dropped:
                if lane.peer:
                    lane.peer.let_go(frame)
                self._settle(Settled(frame, DROPPED))

    def close_epoch(self, epoch: Epoch) -> None:
        """This destination group is gone."""
        for lane in [lane for lane in self._lanes.values() if lane.destination.epoch == epoch]:
            self._fail(lane, "the destination group is gone")

    def serve(self) -> None:
        """Take answers, send what can be sent, and look at the clock."""
        for lane in list(self._lanes.values()):
            self._serve(lane)

    def close(self) -> None:
        """Close every connection; what was under way is settled no more."""
        for peer in self:
            peer.close()
        self._lanes.clear()

    def _new_lane(self, destination: Destination) -> _Lane[PeerT]:
        now_s = self._clock()
        lane: _Lane[PeerT] = _Lane(destination, now_s, now_s + self._patience_s, self._patience_s)
        self._lanes[destination] = lane
        return lane

    def _serve(self, lane: _Lane[PeerT]) -> None:
        if lane.peer:
            try:
                self._exchange(lane, lane.peer)
            except RefusedError as error:
                self._fail(lane, f"{lane.destination.address} refuses: {error}")
                return
            except Exception as error:
                self._break(lane, f"connection to {lane.destination.address} failed: {error}")
        self._look_at_clock(lane)

    def _exchange(self, lane: _Lane[PeerT], peer: PeerT) -> None:
        is_answered = False
        for sequence, said in peer.answers():
            frame = lane.unanswered.pop(sequence, None)
            if frame:
                is_answered = True
                peer.let_go(frame)
                self._settle(Settled(frame, _fault_in(said)))
        if is_answered or not lane.is_busy:
            lane.progress_at = self._clock()
            lane.patience_s = self._patience_s
        if is_answered or not lane.is_busy or not peer.is_open:
            lane.impatient_at = self._clock() + lane.patience_s
        self._send_waiting(lane, peer)

    def _send_waiting(self, lane: _Lane[PeerT], peer: PeerT) -> None:
        while lane.waiting:
            whole = self._attempt(OutgoingFrame.sealed, lane.waiting[0])
            if whole is None:
                lane.waiting.popleft()
                continue
            lane.waiting[0] = whole
            sent = peer.send(lane.num_sent, whole)
            if sent is None:
                return
            lane.waiting.popleft()
            lane.unanswered[lane.num_sent] = sent
            lane.num_sent += 1

    def _look_at_clock(self, lane: _Lane[PeerT]) -> None:
        now_s = self._clock()
        if not lane.is_busy:
            return
        if now_s - lane.progress_at > self._timeout_s:
            self._fail(lane, lane.fault or f"no answer from {lane.destination.address} for {self._timeout_s:g} s")
        elif now_s > lane.impatient_at:
            self._renew(lane)

    def _renew(self, lane: _Lane[PeerT]) -> None:
        """Send what was not answered once more, over a fresh connection."""
        self._break(lane, f"no answer from {lane.destination.address} for {lane.patience_s:g} s")
        lane.patience_s *= 2
        lane.impatient_at = self._clock() + lane.patience_s
        self._connect(lane)

    def _connect(self, lane: _Lane[PeerT]) -> None:
        try:
            lane.peer = self._open_peer(lane.waiting[0])
        except (OSError, ValueError) as error:
            self._fail(lane, f"cannot connect to {lane.destination.address}: {error}")
            return
        self.num_opened += 1

    def _break(self, lane: _Lane[PeerT], fault: str) -> None:
        """The connection is not used any more; its frames wait for the next one, those that were under way first."""
        if lane.peer is None:
            return
        peer, lane.peer = lane.peer, None
        rescued = [self._attempt(peer.rescue, frame) for frame in (*lane.unanswered.values(), *lane.waiting)]
        lane.waiting = deque(frame for frame in rescued if frame is not None)
        lane.unanswered.clear()
        lane.fault = fault
        peer.close()
        if lane.is_busy:
            _log.warning("%s; %d frames wait for another", fault, len(lane.waiting))
        else:
            del self._lanes[lane.destination]

    def _attempt(self, work: Callable[[OutgoingFrame], OutgoingFrame], frame: OutgoingFrame) -> OutgoingFrame | None:
        """Return what work makes of a frame; one whose device fails is settled with that."""
        try:
            return work(frame)
        except Exception as error:
            _log.exception("a payload could not be read")
            self._settle(Settled(frame, f"a payload could not be read: {error}"))
            return None

    def _fail(self, lane: _Lane[PeerT], fault: str) -> None:
        if lane.is_busy:
            _log.warning("%d frames are given up: %s", len(lane.waiting) + len(lane.unanswered), fault)
        del self._lanes[lane.destination]
        if lane.peer:
            lane.peer.close()
        for frame in (*lane.unanswered.values(), *lane.waiting):
            self._settle(Settled(frame, fault))


def _fault_in(said: bytes) -> str | None:
    """Return what the receiver says is wrong with a frame, in words from the closed set; None when nothing is."""
    if not said:
        return None
    text = said.decode(errors="replace")
    return REFUSED + (text if text in RECEIVING_FAULTS else "unknown fault")
