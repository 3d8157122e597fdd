"""Which parts make up a worker of each role: what moves its KV on every rank, and which roles its leader plays.

The one table in the program that knows all three kinds of worker. A new kind is a new entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from decode_worker.inbox import Inbox, LoopbackInbox, RemoteInbox
from decode_worker.mover import ReceivingMover
from decode_worker.prefix_server import NoPrefixServer, PrefixServer, RemotePrefixServer
from decode_worker.role import DecodeRole
from decode_worker.running import ALL_AT_ONCE, Growth, Running
from engine.block_pool import BlockPool, Hold
from engine.rank import Mover, Stationary
from engine.role import Outlet, Ranks, Role
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.loopback import Loopback
from kv_transfer.transports.opening import open_receiver, open_sender
from kv_transfer.transports.transport import Site
from prefill_worker.fetcher import NoFetcher, RemoteFetcher
from prefill_worker.mover import SendingMover
from prefill_worker.outbox import LoopbackOutbox, RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol.layout import KVLayout
from protocol.messages import RoleName
from worker.launch import WorkerLaunch
from worker.two_way_mover import TwoWayMover


@dataclass(frozen=True)
class Cache:
    """One rank's KV cache as movers see it. planes: each [num_layers, num_blocks, own heads, block_size, dim]."""

    planes: tuple[Tensor, ...]
    layout: KVLayout
    rank: int


@dataclass(frozen=True)
class LeaderParts:
    """What the leader's roles stand on, and what each of them may take. min_fetch_tokens: see KVTransferSection."""

    pool: BlockPool
    ranks: Ranks
    outlet: Outlet
    layout: KVLayout
    max_running: int
    outbox_share: float = 1.0
    growth: Growth = ALL_AT_ONCE
    min_fetch_tokens: int = 0


@dataclass(frozen=True)
class Assembly:
    """How one kind of worker is put together. Roles come in the order of their claim on the token budget."""

    mover: Callable[[WorkerLaunch, Cache], Mover]
    roles: Callable[[LeaderParts], list[Role]]
    transport: Callable[[WorkerLaunch], str]


def _sending_mover(launch: WorkerLaunch, cache: Cache) -> Mover:
    transport = open_sender(launch.kv_transfer.transport, _site(launch, cache))
    return SendingMover(KVSender(cache.planes, cache.layout, cache.rank, transport))


def _receiving_mover(launch: WorkerLaunch, cache: Cache) -> Mover:
    transport = open_receiver(launch.kv_transfer.transport, _site(launch, cache))
    return ReceivingMover(KVReceiver(cache.planes, cache.layout, cache.rank, transport), cache.rank)


def _site(launch: WorkerLaunch, cache: Cache) -> Site:
    timeout_s, secret = launch.kv_transfer.timeout_s, launch.secret.key("kv")
    return Site(launch.host, cache.planes[0].device, cache.layout, timeout_s, secret)


def _prefill_mover(launch: WorkerLaunch, cache: Cache) -> Mover:
    mover = _sending_mover(launch, cache)
    fetches = launch.kv_transfer.min_fetch_tokens > 0
    return TwoWayMover(handoffs=mover, fetches=_receiving_mover(launch, cache)) if fetches else mover


def _decode_mover(launch: WorkerLaunch, cache: Cache) -> Mover:
    mover = _receiving_mover(launch, cache)
    fetches = launch.kv_transfer.min_fetch_tokens > 0
    return TwoWayMover(handoffs=mover, fetches=_sending_mover(launch, cache)) if fetches else mover


def _prefill_roles(parts: LeaderParts) -> list[Role]:
    outbox = RemoteOutbox(parts.pool, parts.ranks, parts.layout, parts.outbox_share)
    min_tokens = parts.min_fetch_tokens
    fetcher = RemoteFetcher(parts.ranks, parts.outlet, min_tokens) if min_tokens else NoFetcher()
    return [PrefillRole(parts.pool, outbox, fetcher, parts.outlet, parts.layout.model_hash, parts.max_running)]


def _decode_roles(parts: LeaderParts) -> list[Role]:
    inbox = RemoteInbox(parts.ranks, parts.layout)
    return [_decode_role(parts, inbox, RemotePrefixServer(parts.ranks, parts.outlet))]


def _decode_role(parts: LeaderParts, inbox: Inbox, prefixes: PrefixServer) -> DecodeRole:
    running = Running(parts.pool, parts.ranks, parts.growth)
    return DecodeRole(parts.pool, inbox, prefixes, parts.outlet, running, parts.layout.model_hash, parts.max_running)


def _colocated_roles(parts: LeaderParts) -> list[Role]:
    """Decode first: running streams do not wait for prompts."""
    loopback: Loopback[Hold] = Loopback()
    outbox = LoopbackOutbox(loopback)
    return [
        _decode_role(parts, LoopbackInbox(loopback), NoPrefixServer()),
        PrefillRole(parts.pool, outbox, NoFetcher(), parts.outlet, parts.layout.model_hash, parts.max_running),
    ]


ASSEMBLIES: dict[RoleName, Assembly] = {
    "prefill": Assembly(_prefill_mover, _prefill_roles, lambda launch: launch.kv_transfer.transport),
    "decode": Assembly(_decode_mover, _decode_roles, lambda launch: launch.kv_transfer.transport),
    "colocated": Assembly(lambda launch, cache: Stationary(), _colocated_roles, lambda launch: "loopback"),
}
