"""One role at a time, by hand: what it says to which message. How roles work together is the simulation's business."""

from dataclasses import dataclass, field

from decode_worker.inbox import RemoteInbox
from decode_worker.mover import ReceivingMover
from decode_worker.prefix_server import RemotePrefixServer
from decode_worker.role import DecodeRole
from engine.block_pool import BlockPool
from kv_transfer.receiver import KVReceiver
from prefill_worker.fetcher import NoFetcher
from prefill_worker.outbox import RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol.identity import Attempt
from protocol.layout import Endpoint, KVLayout
from protocol.messages import AnyMessage, Failed, Grant, Handoff, Manifest, Prefill, Reserve, TokenUpdate
from protocol.orders import AnyOrder, ExpectBlocks, Expecting
from protocol.request import Request, SamplingParams
from tests.simulation.clock import Clock
from tests.simulation.kv import KVNetwork, SimulatedReceiver
from tests.simulation.oracle import RankCache

LAYOUT = KVLayout("model", 1, 1, 1, "float32", 4, 1)
PEER = Endpoint(9, LAYOUT, "zmq", ("peer",))


@dataclass
class Surroundings:
    """Outlet and Ranks of a role: everything it says and orders."""

    sent: list[AnyMessage] = field(default_factory=list)
    orders: list[AnyOrder] = field(default_factory=list)
    size: int = 2

    def send(self, message: AnyMessage) -> None:
        self.sent.append(message)

    def emit(self, update: TokenUpdate) -> None:
        raise AssertionError("nothing is computed here")

    def order(self, order: AnyOrder) -> None:
        self.orders.append(order)


def request_of(num_tokens: int, max_tokens: int) -> Request:
    return Request("r", tuple(range(num_tokens)), SamplingParams(max_tokens, seed=0), 60.0)


def attempt_of(number: int) -> Attempt:
    return Attempt("r", number, 1, 2, number)


def decode_role(num_blocks: int) -> tuple[DecodeRole, Surroundings, BlockPool]:
    pool, around = BlockPool(num_blocks, 4), Surroundings()
    inbox, prefixes = RemoteInbox(around, LAYOUT), RemotePrefixServer(around, around)
    return DecodeRole(pool, inbox, prefixes, around, "model", 8), around, pool


def test_decode_refuses_at_once_what_can_never_fit_and_serves_the_next() -> None:
    role, around, pool = decode_role(num_blocks=4)
    role.receive(Reserve(attempt_of(1), request_of(15, 3), PEER))
    (failed,) = around.sent
    assert isinstance(failed, Failed)
    assert (failed.code, pool.counts.held) == ("kv_cache_too_small", 0)
    role.receive(Reserve(attempt_of(2), request_of(15, 2), PEER))
    assert pool.counts.held == 4


def test_prefill_refuses_at_once_what_can_never_fit() -> None:
    pool, around = BlockPool(4, 4), Surroundings()
    role = PrefillRole(pool, RemoteOutbox(pool, around, LAYOUT), NoFetcher(), around, "model", 8)
    role.receive(Prefill(attempt_of(1), request_of(17, 1), PEER))
    (failed,) = around.sent
    assert isinstance(failed, Failed)
    assert failed.code == "kv_cache_too_small"
    assert role.num_waiting == 0


def test_decode_grants_only_when_every_rank_expects() -> None:
    role, around, _ = decode_role(num_blocks=4)
    role.receive(Reserve(attempt_of(1), request_of(5, 2), PEER))
    role.heed(Expecting(1, attempt_of(1)))
    role.heed(Expecting(1, attempt_of(1)))
    assert around.sent == []
    role.heed(Expecting(0, attempt_of(1)))
    assert around.sent == [Grant(attempt_of(1), 0)]


def test_decode_fails_a_handoff_that_is_not_what_was_planned() -> None:
    role, around, pool = decode_role(num_blocks=4)
    role.receive(Reserve(attempt_of(1), request_of(5, 2), PEER))
    role.receive(Handoff(attempt_of(1), 3, Manifest(0, 4, 1, 32)))
    assert isinstance(around.sent[-1], Failed)
    assert pool.counts.held == 0


def test_a_rank_that_expects_frames_wakes_whoever_waits_to_say_so() -> None:
    """Otherwise a leader that admits a waiting reservation sleeps until its next heartbeat before it grants."""
    wakes: list[bool] = []
    transport = SimulatedReceiver(KVNetwork(Clock(), None), "here", lambda: wakes.append(True))
    receiver = KVReceiver(RankCache.empty(LAYOUT, 0, 4).blocks, LAYOUT, 0, transport)
    mover = ReceivingMover(receiver, 0)
    mover.execute(ExpectBlocks(attempt_of(1), PEER, (0, 1), 0, 5))
    assert wakes
    assert transport.arrivals.is_readable
    assert mover.poll() == [Expecting(0, attempt_of(1))]
