"""One group of ranks in one life after another: it joins, serves, loses a rank, is fenced, and comes back as strangers.

The ranks' turns are production code (worker/loops.py) over production roles, pools, movers and links. A rank takes a
turn when something wakes it; turns that it takes for want of anything else must find nothing to do.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from decode_worker.mover import ReceivingMover
from decode_worker.running import ALL_AT_ONCE, Growth
from engine.block_pool import BlockPool
from engine.group import GroupRanks
from engine.rank import Mover, Rank, Stationary
from engine.role import Role
from engine.sampler import SamplingRow
from engine.step_loop import StepLoop
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from prefill_worker.mover import SendingMover
from prefill_worker.role import PrefillRole
from protocol.errors import GroupError
from protocol.identity import new_epoch
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import Join, Ready, Welcome, WorkerInfo
from protocol.orders import AnyOrder, AnyReport, Step, StopRank
from router.launch import GroupSpec
from tests.simulation.control import SimulatedWire
from tests.simulation.device import LateDrawing, OracleEngine, Poisoned, QueuedParkedKV
from tests.simulation.kv import SimulatedReceiver, SimulatedSender
from tests.simulation.oracle import OracleModel, RankCache
from tests.simulation.world import World
from worker.assembly import ASSEMBLIES, LeaderParts
from worker.control_link import ControlLink, Fenced, Stopped
from worker.loops import FollowerLoop, LeaderLoop
from worker.two_way_mover import TwoWayMover

IDLE_S = 1.0
STEP_S = 0.003
MAX_ORDER_S = 0.02


@dataclass(frozen=True)
class GroupSize:
    """What a group is given. frame_bytes is small, so that short prompts have many frames. is_ahead: see StepLoop."""

    num_blocks: int
    block_size: int = 4
    batch_tokens: int = 16
    max_running: int = 8
    num_kv_heads: int = 2
    frame_bytes: int = 64
    outbox_share: float = 0.5
    growth: Growth = ALL_AT_ONCE
    is_ahead: bool = False
    min_fetch_tokens: int = 0


class SimulatedRank:
    """One rank in one life: a process, but for its threads."""

    def __init__(self, world: World, group: "SimulatedGroup", number: int) -> None:
        self._world = world
        self._group = group
        self.number = number
        self.epoch = new_epoch()
        spec = group.spec
        info = WorkerInfo(spec.role, spec.group, number, spec.tensor_parallel, self.epoch, 1, "node")
        self.name = f"{spec.role}-{spec.group}-{number}"
        self.wire: SimulatedWire = world.connect(info, self.wake)
        self.link = ControlLink(self.wire, self.epoch)
        self.is_alive = True
        self.leader_epoch = 0
        self.loop: LeaderLoop | FollowerLoop | None = None
        self._has_plan = False
        self._paused_until_s = 0.0
        self.kv_sender: KVSender | None = None
        self.kv_receiver: KVReceiver | None = None
        self._ordered: deque[AnyOrder] = deque()  # under way
        self.orders: deque[AnyOrder] = deque()
        self.transports: list[SimulatedReceiver | SimulatedSender] = []
        self.cache = RankCache.empty(group.layout, number, group.size.num_blocks)
        self.parked_kv = QueuedParkedKV(self.cache.planes, group.finish_launched)
        self.mover = self._make_mover()
        self.link.send(Join(info, self.name if number == 0 else None))
        self.link.flush()
        world.clock.after(IDLE_S, self._idle)

    def wake(self) -> None:
        if self.is_alive and not self._has_plan:
            self._has_plan = True
            delay_s = max(self._world.rng.random() * STEP_S, self._paused_until_s - self._world.clock.now_s)
            self._world.clock.after(delay_s, self._planned_turn)

    def order(self, order: AnyOrder) -> None:
        """Let the leader's order arrive, in order, sooner or later; a step brings everything with it at once."""
        self._ordered.append(order)
        if isinstance(order, Step):
            self.orders.extend(self._ordered)
            self._ordered.clear()
        else:
            self._world.clock.after(self._world.rng.random() ** 3 * MAX_ORDER_S, self._take_order)

    def _take_order(self) -> None:
        if self._ordered:
            self.orders.append(self._ordered.popleft())
            self.wake()

    def pause(self, pause_s: float) -> None:
        """Take no turn for a while, as a stopped process."""
        self._paused_until_s = self._world.clock.now_s + pause_s

    def die(self, reason: str) -> None:
        """The process is gone, without a word; another one starts in its place some time later."""
        if not self.is_alive:
            return
        self._world.tell(lambda: f"{self.name} dies: {reason}")
        self.is_alive = False
        self._group.bury(self)
        for transport in self.transports:
            transport.close()

    @property
    def is_readable(self) -> bool:
        """Whether something a poller watches would wake this rank."""
        mailboxes = [t.arrivals if isinstance(t, SimulatedReceiver) else t.settled for t in self.transports]
        is_heard = bool(self.orders) if self.number else bool(self._group.reports)
        return bool(self.wire.inbox or is_heard or any(mailbox.is_readable for mailbox in mailboxes))

    def turn(self) -> bool:
        """Do what can be done; return whether there may be more at once. Whatever ends the life ends it here."""
        try:
            if self.loop is None:
                return self._join_in()
            is_busy = bool(self.loop.turn())
            self._group.check_limits(self)
            return is_busy
        except (Fenced, Stopped, GroupError) as end:
            self._group.num_poisoned += isinstance(end, Poisoned)
            self._group.close_channel(self)
            self.die(str(end))
            return False

    def _planned_turn(self) -> None:
        self._has_plan = False
        if (self.is_alive and self._paused_until_s > self._world.clock.now_s) or (
            self.is_alive and (self.turn() or self.is_readable)
        ):
            self.wake()

    def _idle(self) -> None:
        """A poller's timeout: everything there is to do should have woken the rank, so there is nothing to do."""
        if not self.is_alive:
            return
        if self.loop is None and self.wire.is_cut:
            self.die("no welcome from the router in time")
            return
        is_asleep = not self._has_plan
        if is_asleep and self._paused_until_s <= self._world.clock.now_s:
            assert not self.is_readable, "the simulation forgot to wake a rank"
            assert not self.turn(), f"{self.name} slept although there was something to do"
        self._world.clock.after(IDLE_S, self._idle)

    def _join_in(self) -> bool:
        for message in self.link.receive():
            if isinstance(message, Welcome):
                self.leader_epoch = message.leader_epoch
                self._group.assemble()
        return False

    def _make_mover(self) -> Mover:
        is_two_way = self._group.size.min_fetch_tokens > 0
        match self._group.spec.role:
            case "prefill":
                sending = self._make_sending_mover()
                return TwoWayMover(sending, self._make_receiving_mover()) if is_two_way else sending
            case "decode":
                receiving = self._make_receiving_mover()
                return TwoWayMover(receiving, self._make_sending_mover()) if is_two_way else receiving
            case _:
                return Stationary()

    def _make_sending_mover(self) -> Mover:
        group, sender = self._group, SimulatedSender(self._world.kv, self.wake)
        self.transports.append(sender)
        self.kv_sender = KVSender(self.cache.planes, group.layout, self.number, sender, group.size.frame_bytes)  # type: ignore[arg-type]
        return SendingMover(self.kv_sender)

    def _make_receiving_mover(self) -> Mover:
        group, receiver = self._group, SimulatedReceiver(self._world.kv, self.name, self.wake)
        self.transports.append(receiver)
        self.kv_receiver = KVReceiver(self.cache.planes, group.layout, self.number, receiver, group.size.frame_bytes)  # type: ignore[arg-type]
        return ReceivingMover(self.kv_receiver, self.number)


class SimulatedGroup:
    """All lives of all ranks of one group. While it serves, this is the leader's channel to its followers too."""

    def __init__(self, world: World, spec: GroupSpec, size: GroupSize, restart_s: float) -> None:
        self._world = world
        self._restart_s = restart_s
        self.spec = spec
        self.size = size
        planes = keys_and_values(size.num_kv_heads, 1, "float32")
        self.layout = KVLayout("model", 1, planes, size.block_size, spec.tensor_parallel)
        self.reports: deque[AnyReport] = deque()
        self._past_messages: dict[int, list[bytes]] = {}
        self.pool: BlockPool | None = None
        self.num_poisoned = 0
        self._launched: LateDrawing | None = None
        self.roles: list[Role] = []
        self.ranks: dict[int, SimulatedRank] = {}
        for number in range(spec.tensor_parallel):
            self.ranks[number] = SimulatedRank(world, self, number)

    @property
    def is_serving(self) -> bool:
        return all(rank.is_alive and rank.loop is not None for rank in self.ranks.values())

    @property
    def is_cut_off(self) -> bool:
        """Whether a rank has lost the router, known or not."""
        return any(rank.wire.is_cut for rank in self.ranks.values())

    @property
    def num_jobs(self) -> int:
        return sum(role.num_running + role.num_waiting for role in self.roles)

    @property
    def is_at_rest(self) -> bool:
        """Serving, with a whole pool, no request, and no transfer on any rank."""
        if not self.is_serving or self.pool is None:
            return False
        is_parked = any(len(rank.parked_kv) for rank in self.ranks.values())
        has_transfers = any(map(_has_transfers, self.ranks.values()))
        return self.pool.counts.held == 0 and self.num_jobs == 0 and not is_parked and not has_transfers

    def check_limits(self, rank: SimulatedRank) -> None:
        """Neither a rank's host copies nor what prefill computes ahead of grants may be more than was allowed."""
        if len(rank.parked_kv):
            num_tokens = [copy.num_tokens for copy in rank.parked_kv._parked.values()]
            num_blocks = sum(-(-num // self.size.block_size) for num in num_tokens)
            assert num_blocks <= self.size.growth.max_parked_blocks, f"{num_blocks} blocks are parked"
        for role in self.roles if rank.number == 0 and self.spec.role == "prefill" else ():
            assert isinstance(role, PrefillRole)
            holds = [job.sequence.hold for job in role._jobs.values() if job.sequence and not job.grant]
            num_blocks = sum(len(hold.block_ids) for hold in holds)
            assert num_blocks <= self.size.outbox_share * self.size.num_blocks, f"{num_blocks} blocks are ungranted"

    def _restart(self, number: int) -> None:
        rank = self.ranks[number] = SimulatedRank(self._world, self, number)
        for data in self._past_messages.pop(number, ()):  # what was queued for an earlier life
            self._world.clock.after(self._world.rng.random() * 0.1, partial(rank.wire.take, data))

    def bury(self, rank: SimulatedRank) -> None:
        """A rank has died: another one starts in its place some time later, and may hear what was meant for it."""
        rank.wire.end()
        self._past_messages[rank.number] = rank.wire.recent[-self._world.rng.randint(1, 8) :]
        delay_s = self._restart_s * (0.5 + self._world.rng.random())
        self._world.clock.after(delay_s, lambda: self._restart(rank.number))

    def close_channel(self, rank: SimulatedRank) -> None:
        """A leader that ends in good order tells its followers, and lets go of everything."""
        if not isinstance(rank.loop, LeaderLoop):
            return
        with suppress(GroupError):
            for role in self.roles:
                role.drop_all()
        for follower in list(self.ranks.values())[1:]:
            if follower.leader_epoch == rank.epoch:
                follower.order(StopRank())

    def assemble(self) -> None:
        """Begin to serve once all ranks live and were led to the same leader."""
        leader, *followers = self.ranks.values()
        if all(
            rank.is_alive and rank.loop is None and rank.leader_epoch == leader.epoch for rank in self.ranks.values()
        ):
            self._serve(leader, followers)

    def _serve(self, leader: SimulatedRank, followers: list[SimulatedRank]) -> None:
        size = self.size
        self.reports.clear()
        self._launched = None
        self.pool = BlockPool(size.num_blocks, size.block_size)
        model = OracleModel([rank.cache for rank in self.ranks.values()], size.block_size)
        for follower in followers:
            end = FollowerEnd(follower, self._report)
            rank = Rank(OracleEngine(None), follower.parked_kv, follower.mover)  # type: ignore[arg-type]
            follower.loop = FollowerLoop(follower.link, end, rank, self._world.clock.read)  # type: ignore[arg-type]
        channel = LeaderEnd(followers, self.reports)
        own_rank = Rank(OracleEngine(model), leader.parked_kv, leader.mover)  # type: ignore[arg-type]
        ranks = GroupRanks(self.spec.tensor_parallel, channel, own_rank)  # type: ignore[arg-type]
        limits = (size.max_running, size.outbox_share, size.growth, size.min_fetch_tokens)
        parts = LeaderParts(self.pool, ranks, leader.link, self.layout, *limits)
        self.roles = ASSEMBLIES[self.spec.role].roles(parts)
        steps = StepLoop(
            self.roles, ranks.forward, self._draw, size.batch_tokens, size.block_size, is_ahead=size.is_ahead
        )
        leader.loop = LeaderLoop(leader.link, ranks, self.roles, steps, self.pool, self._world.clock.read)
        leader.link.send(Ready(self._endpoint(leader), size.num_blocks * size.block_size))
        leader.wake()

    def _draw(self, compute: Callable[[], torch.Tensor], rows: SequenceOf[SamplingRow]) -> LateDrawing:
        self._launched = LateDrawing(compute, rows)
        return self._launched

    def finish_launched(self) -> None:
        """Compute what was launched last, if it is not yet."""
        if self._launched:
            _ = self._launched.token_ids

    def _endpoint(self, leader: SimulatedRank) -> Endpoint:
        transport = "loopback" if self.spec.role == "colocated" else "zmq"
        return Endpoint(leader.epoch, self.layout, transport, tuple(rank.name for rank in self.ranks.values()))

    def _report(self, report: AnyReport) -> None:
        self.reports.append(report)
        self.ranks[0].wake()


class LeaderEnd:
    """What engine.group.Leader is to GroupRanks: orders go to all followers, reports come back."""

    def __init__(self, followers: list[SimulatedRank], reports: deque[AnyReport]) -> None:
        self.counters: dict[str, int] = {}
        self._followers = followers
        self._reports = reports

    def send(self, order: AnyOrder) -> None:
        for follower in self._followers:
            if not follower.is_alive:
                raise GroupError("a follower is gone")
            follower.order(order)
        for follower in self._followers:
            if isinstance(order, Step):
                follower.turn()  # ranks meet in the collectives of every step
                if not follower.is_alive:
                    raise GroupError("a follower was lost during a step")

    def reports(self) -> list[AnyReport]:
        reports = list(self._reports)
        self._reports.clear()
        return reports


class FollowerEnd:
    """What engine.group.Follower is to FollowerLoop."""

    def __init__(self, rank: SimulatedRank, report: Callable[[AnyReport], None]) -> None:
        self._rank = rank
        self.rank = rank.number
        self.report = report

    def orders(self) -> list[AnyOrder]:
        orders = list(self._rank.orders)
        self._rank.orders.clear()
        return orders


def _has_transfers(rank: SimulatedRank) -> bool:
    is_busy = any(isinstance(transport, SimulatedSender) and not transport.is_idle for transport in rank.transports)
    ends = (rank.kv_sender, rank.kv_receiver)
    return is_busy or any(end is not None and end._transfers for end in ends)
