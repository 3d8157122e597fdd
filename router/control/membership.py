"""Who is in the cluster: ranks, their lives (epochs) and their groups. Pure state: messages in, actions out.

A group is one failure unit. When a rank's connection is gone the whole group's life is over: its other ranks are fenced
and every other leader hears that the epoch is lost. Nothing is ever concluded from silence. Used by
controller.py; what becomes of the requests of a lost group is attempts.py's work.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import msgspec

from protocol.identity import Epoch
from protocol.layout import Endpoint
from protocol.messages import (
    BlockCounts,
    Fence,
    Heartbeat,
    Join,
    PeerLost,
    Progress,
    Ready,
    RoleName,
    Stop,
    Welcome,
    WorkerInfo,
    WorkerState,
)
from router.control.events import Drop, Send
from router.control.policies import ReadyGroup
from router.launch import GroupSpec

MAX_REMEMBERED = 4096
MAX_DOING_CHARS = 200

GroupKey = tuple[RoleName, int]


class GroupLost(msgspec.Struct, frozen=True):
    """The life of the group whose leader had this epoch is over; all attempts on it end."""

    epoch: Epoch


class Reject(msgspec.Struct, frozen=True):
    """Tell the sender of the message in hand that it has no place here. No epoch is named: it is no member."""

    reason: str


MemberAction = Send | Drop | GroupLost | Reject


class Member(msgspec.Struct):
    """One rank in its present or last life."""

    info: WorkerInfo
    rendezvous: str | None
    state: WorkerState = "starting"
    doing: str = "joined"
    load: Heartbeat = Heartbeat(BlockCounts(), 0, 0, 0)

    @property
    def is_alive(self) -> bool:
        return self.state != "dead"


class Group:
    """The ranks that work as one. ready is None until the leader's Ready has come, and again once a rank is lost."""

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.ranks: dict[int, Member] = {}
        self.ready: ReadyGroup | None = None

    @property
    def living(self) -> list[Member]:
        return [rank for _, rank in sorted(self.ranks.items()) if rank.is_alive]

    @property
    def leader(self) -> Member | None:
        rank = self.ranks.get(0)
        return rank if rank is not None and rank.is_alive else None

    @property
    def is_complete(self) -> bool:
        return len(self.living) == self.spec.tensor_parallel


def identity_of(info: WorkerInfo) -> bytes:
    """Return the identity of a rank's control socket: unique per life, so that nothing reaches a later one."""
    return f"{info.role}-{info.group}-{info.rank}-{info.epoch:x}".encode()


class Membership:
    """All groups that are expected, and every life that was seen of them."""

    def __init__(self, specs: Iterable[GroupSpec]) -> None:
        self.groups: dict[GroupKey, Group] = {(spec.role, spec.group): Group(spec) for spec in specs}
        self._living: dict[Epoch, tuple[Group, Member]] = {}
        self._epochs: dict[bytes, Epoch] = {}  # of the living, by the identity of their sockets
        self._past: OrderedDict[Epoch, bytes] = OrderedDict()
        self._heard: set[Epoch] = set()
        self._heard_before: set[Epoch] = set()

    @property
    def has_workers(self) -> bool:
        return bool(self._living)

    def is_alive(self, epoch: Epoch) -> bool:
        return epoch in self._living

    def identity(self, epoch: Epoch) -> bytes | None:
        """Return the socket identity of a living rank."""
        found = self._living.get(epoch)
        return identity_of(found[1].info) if found else None

    def address(self, epoch: Epoch) -> bytes | None:
        """As identity, but also for lives that are over: a fenced rank has yet to hear of it."""
        return self.identity(epoch) or self._past.get(epoch)

    def leader_of(self, epoch: Epoch) -> Epoch | None:
        """Return the epoch of the leader of a living rank's group."""
        leader = self._living[epoch][0].leader
        return leader.info.epoch if leader else None

    def leads(self, epoch: Epoch) -> bool:
        """Whether this epoch is that of a living leader."""
        found = self._living.get(epoch)
        return found is not None and found[1].info.rank == 0

    def ready_groups(self, role: RoleName) -> list[ReadyGroup]:
        """Return the groups of this role that take requests, by number."""
        groups = (group for key, group in sorted(self.groups.items()) if key[0] == role)
        return [group.ready for group in groups if group.ready is not None]

    def hear(self, epoch: Epoch) -> None:
        """A living rank has said something."""
        self._heard.add(epoch)

    def silent(self) -> list[Epoch]:
        """Return the living ranks that have said nothing since the call before the last one."""
        silent = self._living.keys() - self._heard - self._heard_before
        self._heard_before, self._heard = self._heard, set()
        return list(silent)

    # --- what ranks say -----------------------------------------------------------------------------------------------

    def join(self, message: Join) -> list[MemberAction]:
        """A rank begins a life. If the rank has another one that we thought alive, that one is over, and its group."""
        info = message.worker
        if info.epoch in self._living:
            return [Drop("bad_join")]
        problem = self._join_problem(message)
        if problem is not None:
            return [Drop("bad_join"), Reject(problem)]
        group = self.groups[info.role, info.group]
        actions: list[MemberAction] = []
        previous = group.ranks.get(info.rank)
        if previous is not None and previous.is_alive:
            actions += self.lose(previous.info.epoch, "a new life of it has joined")
        rank = Member(info, message.rendezvous)
        group.ranks[info.rank] = rank
        self._living[info.epoch] = (group, rank)
        self._epochs[identity_of(info)] = info.epoch
        return actions + _welcomes(group, rank)

    def _join_problem(self, message: Join) -> str | None:
        info = message.worker
        group = self.groups.get((info.role, info.group))
        if info.epoch in self._past:
            return "this life is over"
        if group is None:
            return f"no {info.role} group {info.group} is expected"
        if info.tensor_parallel != group.spec.tensor_parallel or not 0 <= info.rank < info.tensor_parallel:
            size = group.spec.tensor_parallel
            return f"rank {info.rank} of {info.tensor_parallel} does not fit a group of {size} ranks"
        if (info.rank == 0) != (message.rendezvous is not None):
            return "the leader, and nobody else, must say where its followers find it"
        return None

    def progress(self, epoch: Epoch, message: Progress) -> list[MemberAction]:
        self._living[epoch][1].doing = message.doing[:MAX_DOING_CHARS]
        return []

    def ready(self, epoch: Epoch, message: Ready) -> list[MemberAction]:
        """A leader says that its group serves."""
        group, rank = self._living[epoch]
        problem = _ready_problem(group, rank, message)
        if problem is not None:
            return [Drop("bad_ready"), *self.lose(epoch, problem, is_reachable=True)]
        group.ready = ReadyGroup(group.spec.group, epoch, message.endpoint, message.num_tokens)
        for member in group.living:
            member.state, member.doing = "ready", "serving"
        return []

    def heartbeat(self, epoch: Epoch, message: Heartbeat) -> list[MemberAction]:
        rank = self._living[epoch][1]
        rank.load = message
        return []

    # --- what becomes of them -----------------------------------------------------------------------------------------

    def lose(self, epoch: Epoch, reason: str, is_reachable: bool = False) -> list[MemberAction]:
        """A rank's life is over, and with it its group's. is_reachable: it must be told too."""
        return self._tell_leaders(self._end(epoch, reason, is_reachable))

    def silence(self, identity: bytes, reason: str) -> list[MemberAction]:
        """Nothing more will be read of whoever sends under this identity: the life is over, if it is a rank's."""
        epoch = self._epochs.get(identity)
        return [] if epoch is None else self.lose(epoch, reason, is_reachable=True)

    def lose_all(self, reasons: Mapping[Epoch, str]) -> list[MemberAction]:
        """As lose, of several at once: none of them is told of the others."""
        return self._tell_leaders([action for epoch, reason in reasons.items() for action in self._end(epoch, reason)])

    def _end(self, epoch: Epoch, reason: str, is_reachable: bool = False) -> list[MemberAction]:
        if epoch not in self._living:
            return []
        group, lost = self._living[epoch]
        leader = group.leader
        name = f"rank {lost.info.rank} of {group.spec.role} group {group.spec.group} is lost: {reason}"
        others = [rank for rank in group.living if rank is not lost or is_reachable]
        actions: list[MemberAction] = [Send(rank.info.epoch, Fence(name)) for rank in others]
        for rank in group.living:
            self._bury(rank, reason if rank is lost else name)
        group.ready = None
        return [*actions, GroupLost(leader.info.epoch)] if leader is not None else actions

    def _bury(self, rank: Member, reason: str) -> None:
        rank.state, rank.doing = "dead", reason
        rank.load = Heartbeat(BlockCounts(), 0, 0, 0)
        identity = identity_of(rank.info)
        self._past[rank.info.epoch] = identity
        del self._living[rank.info.epoch], self._epochs[identity]
        while len(self._past) > MAX_REMEMBERED:
            self._past.popitem(last=False)

    def _tell_leaders(self, actions: list[MemberAction]) -> list[MemberAction]:
        """Let every leader that is left hear of the groups that these actions say are lost."""
        lost = [action for action in actions if isinstance(action, GroupLost)]
        leaders = [group.leader.info.epoch for group in self.groups.values() if group.leader] if lost else []
        told = [Send(leader, PeerLost(group.epoch)) for group in lost for leader in leaders]
        return [*(action for action in actions if not isinstance(action, GroupLost)), *told, *lost]

    def drain(self) -> None:
        """Show every living rank as draining; what is running goes on."""
        for _, rank in self._living.values():
            rank.state = "draining"

    def stop(self) -> list[MemberAction]:
        """Nothing more will come for anybody."""
        return [Send(epoch, Stop()) for epoch in self._living]


def _welcomes(group: Group, joined: Member) -> list[MemberAction]:
    """A leader makes everyone of its group welcome; a follower is so at once when its leader is there."""
    leader = group.leader
    if leader is None or leader.rendezvous is None:
        return []
    welcome = Welcome(leader.rendezvous, leader.info.epoch)
    ranks = group.living if joined is leader else [joined]
    return [Send(rank.info.epoch, welcome) for rank in ranks]


def _ready_problem(group: Group, rank: Member, message: Ready) -> str | None:
    endpoint, size = message.endpoint, group.spec.tensor_parallel
    if rank.info.rank != 0:
        return "a follower cannot say that the group is ready"
    if not group.is_complete:
        return f"the group said that it is ready with {len(group.living)} of {size} ranks"
    if endpoint.epoch != rank.info.epoch:
        return "its endpoint carries another epoch than its leader"
    return _size_problem(endpoint, size)


def _size_problem(endpoint: Endpoint, size: int) -> str | None:
    if endpoint.layout.tensor_parallel != size:
        return f"its layout is of {endpoint.layout.tensor_parallel} ranks, not {size}"
    if len(endpoint.addresses) != size:
        return f"its endpoint has {len(endpoint.addresses)} addresses, not {size}"
    return None
