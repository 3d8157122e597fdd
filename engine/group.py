"""The ranks of one group find one another and stay in step.

The leader (rank 0) opens a store on its host; its address is the group's rendezvous. Followers read from it where the
leader's order socket is, and all of them open the process group that tensor parallelism uses. From then on the leader
sends orders and followers report. A group is one failure unit: what goes wrong here ends every rank's life, never less.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
import zmq
from torch.distributed.distributed_c10d import Store

from engine.rank import Rank
from kernels.process_group import open_group, open_store
from models.tensor_parallel import TensorParallel
from protocol.errors import GroupError, WireError
from protocol.orders import (
    AnyOrder,
    AnyReport,
    Batch,
    Counted,
    Enlist,
    Step,
    StopRank,
    decode_order,
    decode_report,
    encode,
)
from protocol.secret import Secret
from protocol.sockets import bind, connect, prepare_for_members

ASSEMBLY_TIMEOUT_S = 60.0
LOADING_TIMEOUT_S = 600.0
COLLECTIVE_TIMEOUT_S = 60.0
_LISTEN_EVERY_MS = 250
_ORDERS_KEY = "orders"
_MAX_ORDERS = 100_000


@dataclass(frozen=True)
class Place:
    """One rank's place in its group. device says which collectives library connects the ranks."""

    rank: int
    size: int
    host: str
    device: str

    def connect(self, store: Store) -> TensorParallel:
        """Open the group's collectives; return when every rank has come. Raise GroupError when one does not in time."""
        if self.size == 1:
            return TensorParallel(0, 1, None)
        try:
            group = open_group(store, self.rank, self.size, self.host, self.device, COLLECTIVE_TIMEOUT_S)
        except RuntimeError as error:
            raise GroupError(f"the group's {self.size} ranks did not find one another: {error}") from error
        return TensorParallel(self.rank, self.size, group)


class Leader:
    """Rank 0's end of the group's channel. counters: what came here that was not used."""

    def __init__(self, place: Place, secret: Secret) -> None:
        self._place = place
        self.counters = {"unparsed_reports": 0, "stray_reports": 0}
        self._context = zmq.Context()
        self._socket = _prepared(self._context.socket(zmq.ROUTER), secret)
        self._store = open_store(place.host, 0, is_server=True, timeout_s=ASSEMBLY_TIMEOUT_S)
        self._store.set(_ORDERS_KEY, bind(self._socket, place.host))
        self._addresses: dict[int, str] = {}  # for KV, of the ranks that have enlisted

    @property
    def rendezvous(self) -> str:
        """Where followers start, "host:port"."""
        return f"{self._place.host}:{self._store.port}"

    @property
    def pollable(self) -> "zmq.Socket[bytes]":
        """Readable when a follower has reported."""
        return self._socket

    def connect(self) -> TensorParallel:
        """See Place.connect."""
        return self._place.connect(self._store)

    def await_followers(self, listen: Callable[[], object]) -> list[str]:
        """Return the followers' KV addresses by rank, once all have enlisted. Raise GroupError if not in time.

        listen is called a few times a second meanwhile: a follower that is lost never enlists, and only the router
        knows. What it raises ends the wait.
        """
        deadline = time.monotonic() + LOADING_TIMEOUT_S
        while missing := sorted(set(range(1, self._place.size)) - self._addresses.keys()):
            if time.monotonic() > deadline:
                text = f"ranks {missing} of this group did not load their weights within {LOADING_TIMEOUT_S:g} s"
                raise GroupError(text)
            listen()
            self._socket.poll(_LISTEN_EVERY_MS)
            self.reports()
        return [self._addresses[rank] for rank in range(1, self._place.size)]

    def send(self, order: AnyOrder) -> None:
        """Send an order to every follower. Raise GroupError when one is gone."""
        if not self._addresses:
            return
        data = encode(order)
        for rank in self._addresses:
            try:
                self._socket.send_multipart([_identity_of(rank), data], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                raise GroupError(f"rank {rank} of this group cannot be reached: {error}") from error

    def reports(self) -> list[AnyReport]:
        """Return what followers have reported since the last call, without waiting."""
        reports: list[AnyReport] = []
        while self._socket.poll(0):
            identity, data = self._socket.recv_multipart()[:2]
            try:
                report = decode_report(data)
            except WireError:
                self.counters["unparsed_reports"] += 1
                continue
            if identity != _identity_of(report.rank) or not 0 < report.rank < self._place.size:
                self.counters["stray_reports"] += 1
                continue
            if isinstance(report, Enlist):
                self._addresses[report.rank] = report.kv_address
            reports.append(report)
        return reports

    def close(self) -> None:
        """Tell followers to stop, and let go of everything."""
        with suppress(GroupError):  # a follower that is gone needs no order to stop
            self.send(StopRank())
        self._socket.close(linger=1000)
        self._context.term()


class Follower:
    """Any other rank's end of the group's channel."""

    def __init__(self, place: Place, rendezvous: str, secret: Secret) -> None:
        self._place = place
        host, _, port = rendezvous.rpartition(":")
        try:
            self._store = open_store(host, int(port), is_server=False, timeout_s=ASSEMBLY_TIMEOUT_S)
            orders_address = self._store.get(_ORDERS_KEY).decode()
        except (RuntimeError, ValueError) as error:
            raise GroupError(f"no leader at {rendezvous}: {error}") from error
        self._context = zmq.Context()
        self._socket = _prepared(self._context.socket(zmq.DEALER), secret)
        self._socket.setsockopt(zmq.IDENTITY, _identity_of(place.rank))
        connect(self._socket, orders_address)

    @property
    def rank(self) -> int:
        """This follower's place in its group."""
        return self._place.rank

    @property
    def pollable(self) -> "zmq.Socket[bytes]":
        """Readable when the leader has sent an order."""
        return self._socket

    def connect(self) -> TensorParallel:
        """See Place.connect."""
        return self._place.connect(self._store)

    def report(self, report: AnyReport) -> None:
        """Tell the leader. Raise GroupError when it takes nothing any more."""
        try:
            self._socket.send(encode(report), zmq.NOBLOCK)
        except zmq.Again:
            raise GroupError("the leader takes no more reports") from None

    def orders(self) -> list[AnyOrder]:
        """Return the orders that have come since the last call, without waiting. Raise WireError for a bad one."""
        orders: list[AnyOrder] = []
        while self._socket.poll(0):
            orders.append(decode_order(self._socket.recv()))
        return orders

    def close(self) -> None:
        """Let go of everything."""
        self._socket.close()
        self._context.term()


class GroupRanks:
    """All ranks as the leader's roles see them (engine.role.Ranks)."""

    def __init__(self, size: int, leader: Leader, own_rank: Rank) -> None:
        self._leader = leader
        self._own_rank = own_rank
        self._counted: dict[int, dict[str, int]] = {}  # by follower, as last reported
        self.size = size

    def order(self, order: AnyOrder) -> None:
        """Have every rank carry this out."""
        self._leader.send(order)
        self._own_rank.execute(order)

    def forward(self, batch: Batch, drawn: torch.Tensor | None) -> torch.Tensor:
        """Run a batch on every rank, given what the batch before draws; return logits [num_sampled, vocab_size].

        Raise OutOfMemoryError when this rank is alone, and GroupError when others are in the middle of the same batch.
        """
        self._leader.send(Step(batch))
        try:
            logits = self._own_rank.forward(batch, drawn)
        except torch.OutOfMemoryError as error:
            if self.size == 1:
                raise
            raise GroupError(f"no memory for a step that other ranks are computing: {error}") from error
        assert logits is not None, "rank 0 gets the logits"
        return logits

    def reports(self) -> list[AnyReport]:
        """Return what any rank has reported since the last call, but for counts, which counters adds up."""
        reports = [*self._leader.reports(), *self._own_rank.mover.poll()]
        self._counted |= {report.rank: report.counters for report in reports if isinstance(report, Counted)}
        return [report for report in reports if not isinstance(report, Counted)]

    @property
    def counters(self) -> dict[str, int]:
        """Return what all ranks have counted, added up; followers' counts are a heartbeat old at most."""
        return sums([self._leader.counters, self._own_rank.mover.counters(), *self._counted.values()])


def _prepared(socket: "zmq.Socket[bytes]", secret: Secret) -> "zmq.Socket[bytes]":
    return prepare_for_members(socket, secret.key("orders"), queue=_MAX_ORDERS)


def _identity_of(rank: int) -> bytes:
    """Return the identity of a follower's socket."""
    return f"rank-{rank}".encode()


def sums(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up counters by name; those that are zero everywhere stay."""
    total: Counter[str] = Counter()
    for counted in counters:
        total.update(counted)
    return dict(total)
