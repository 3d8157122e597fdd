"""What a worker does over and over until it is told to end: the leader's loop and the followers'.

The leader takes messages and reports, runs a step, and says what came of it. A follower carries out orders. Both sleep
only when there is nothing to do, and never longer than a heartbeat. One turn of either never waits, so that a simulator
can take turns under a clock of its own.
"""

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf

import zmq

from engine.block_pool import BlockPool
from engine.group import Follower, GroupRanks, sums
from engine.rank import Rank
from engine.role import Role
from engine.step_loop import StepLoop
from protocol.messages import AnyMessage, Heartbeat, PeerLost, Progress
from protocol.orders import ClosePeer, Counted, StopRank
from worker.control_link import ControlLink, Stopped

HEARTBEAT_S = 0.25


class LeaderLoop:
    """The leader's loop: requests in, tokens out."""

    def __init__(
        self,
        link: ControlLink,
        ranks: GroupRanks,
        roles: SequenceOf[Role],
        steps: StepLoop,
        pool: BlockPool,
        clock: Callable[[], float] = time.monotonic,
        come_round: Callable[[], None] = lambda: None,
    ) -> None:
        """come_round is called in every turn, before anything else."""
        self._link = link
        self._ranks = ranks
        self._roles = roles
        self._steps = steps
        self._pool = pool
        self._clock = clock
        self._come_round = come_round
        self._is_busy = True
        self._heartbeat_at = 0.0

    def run(self, wakers: Iterable[zmq.Socket[bytes] | int]) -> None:
        """Serve until Stopped or Fenced is raised. wakers: what becomes readable when there is something to do."""
        poller = _poller(wakers)
        try:
            while True:
                poller.poll(0 if self._is_busy else int(HEARTBEAT_S * 1000))
                self.turn()
        finally:
            for role in self._roles:
                role.drop_all()

    def turn(self) -> bool:
        """Do everything that can be done now; return whether anything was, so that there may be more at once."""
        was_busy, self._is_busy = self._is_busy, self._work()
        if was_busy and not self._is_busy:
            self._heartbeat()  # what the router knows last before a silence should be true
        return self._is_busy

    def _work(self) -> bool:
        self._come_round()
        messages, reports = self._link.receive(), self._ranks.reports()
        for message in messages:
            self._take(message)
        for report in reports:
            for role in self._roles:
                role.heed(report)
        has_stepped = self._steps.step()
        if self._clock() >= self._heartbeat_at:
            self._heartbeat()
        self._link.flush()
        return bool(messages or reports or has_stepped)

    def _take(self, message: AnyMessage) -> None:
        if isinstance(message, PeerLost):
            self._ranks.order(ClosePeer(message.epoch))
            return
        for role in self._roles:
            role.receive(message)

    def _heartbeat(self) -> None:
        self._heartbeat_at = self._clock() + HEARTBEAT_S
        self._link.send(
            Heartbeat(
                blocks=self._pool.counts,
                running=sum(role.num_running for role in self._roles),
                waiting=sum(role.num_waiting for role in self._roles),
                steps=self._steps.num_steps,
                counters=sums([self._link.counters, self._ranks.counters, *(role.counters for role in self._roles)]),
            )
        )
        self._link.flush()


class FollowerLoop:
    """A follower's loop: orders in, reports out."""

    def __init__(
        self,
        link: ControlLink,
        follower: Follower,
        rank: Rank,
        clock: Callable[[], float] = time.monotonic,
        come_round: Callable[[], None] = lambda: None,
    ) -> None:
        """come_round is called in every turn, before anything else."""
        self._come_round = come_round
        self._link = link
        self._follower = follower
        self._rank = rank
        self._clock = clock
        self._speak_at = 0.0
        self._counted: dict[str, int] = {}

    def run(self, wakers: Iterable[zmq.Socket[bytes] | int]) -> None:
        """Serve until Stopped or Fenced is raised. wakers: what becomes readable when there is something to do."""
        poller = _poller(wakers)
        while True:
            poller.poll(int(HEARTBEAT_S * 1000))
            self.turn()

    def turn(self) -> None:
        """Carry out the orders that have come, and report."""
        self._come_round()
        self._link.receive()
        for order in self._follower.orders():
            if isinstance(order, StopRank):
                raise Stopped("the leader said stop")
            self._rank.execute(order)
        for report in self._rank.mover.poll():
            self._follower.report(report)
        if self._clock() >= self._speak_at:
            self._speak()

    def _speak(self) -> None:
        """Say to the router that this rank serves, and to the leader what was counted here.

        A rank that never sent anything would not learn that the router has forgotten it. The leader's heartbeat speaks
        for the whole group, so it must know what was dropped here.
        """
        self._speak_at = self._clock() + HEARTBEAT_S
        self._link.send(Progress("serving"))
        self._link.flush()
        counters = sums([self._link.counters, self._rank.mover.counters()])
        if counters != self._counted:
            self._counted = counters
            self._follower.report(Counted(self._follower.rank, counters))


def _poller(wakers: Iterable[zmq.Socket[bytes] | int]) -> zmq.Poller:
    poller = zmq.Poller()
    for waker in wakers:
        poller.register(waker, zmq.POLLIN)
    return poller
