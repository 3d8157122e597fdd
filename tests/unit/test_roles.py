"""One role at a time, by hand: what it says to which message. How roles work together is the simulation's business."""

from dataclasses import dataclass, field

import pytest

from decode_worker.inbox import RemoteInbox
from decode_worker.mover import ReceivingMover
from decode_worker.prefix_server import RemotePrefixServer
from decode_worker.role import DecodeRole
from decode_worker.running import ALL_AT_ONCE, Growth, Running
from engine.block_pool import BlockPool
from engine.prefix_hash import HashChain, chain_root
from engine.sampler import Drawn
from kv_transfer.receiver import KVReceiver
from prefill_worker.fetcher import NoFetcher, RemoteFetcher
from prefill_worker.outbox import RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol.identity import Attempt
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import (
    Abort,
    AnyMessage,
    Committed,
    Failed,
    Fetch,
    Grant,
    Handoff,
    Manifest,
    Prefill,
    Reserve,
    TokenUpdate,
    Unfetched,
)
from protocol.orders import AnyOrder, DropTransfer, ExpectBlocks, Expecting, FetchBroken, Received, SendBlocks
from protocol.request import Request, SamplingParams
from tests.simulation.clock import Clock
from tests.simulation.kv import KVNetwork, SimulatedReceiver
from tests.simulation.oracle import RankCache

LAYOUT = KVLayout("model", 1, keys_and_values(1, 1, "float32"), 4, 1)
PEER = Endpoint(9, LAYOUT, "zmq", ("peer",))


@dataclass
class Surroundings:
    """Outlet and Ranks of a role: everything it says and orders."""

    sent: list[AnyMessage] = field(default_factory=list)
    orders: list[AnyOrder] = field(default_factory=list)
    updates: list[TokenUpdate] = field(default_factory=list)
    size: int = 2

    def send(self, message: AnyMessage) -> None:
        self.sent.append(message)

    def emit(self, update: TokenUpdate) -> None:
        self.updates.append(update)

    def order(self, order: AnyOrder) -> None:
        self.orders.append(order)


def request_of(num_tokens: int, max_tokens: int) -> Request:
    return Request("r", tuple(range(num_tokens)), SamplingParams(max_tokens, seed=0))


def attempt_of(number: int) -> Attempt:
    return Attempt("r", number, 1, 2, number)


def decode_role(num_blocks: int, growth: Growth = ALL_AT_ONCE) -> tuple[DecodeRole, Surroundings, BlockPool]:
    pool, around = BlockPool(num_blocks, 4), Surroundings()
    running = Running(pool, around, growth)
    inbox, prefixes = RemoteInbox(around, LAYOUT), RemotePrefixServer(around, around)
    return DecodeRole(pool, inbox, prefixes, around, running, "model", 8), around, pool


def prefill_role(
    num_blocks: int, outbox_share: float = 1.0, max_computing: int = 8
) -> tuple[PrefillRole, Surroundings, BlockPool]:
    pool, around = BlockPool(num_blocks, 4), Surroundings()
    outbox = RemoteOutbox(pool, around, LAYOUT, outbox_share)
    return PrefillRole(pool, outbox, NoFetcher(), around, "model", max_computing), around, pool


def prompt(role: PrefillRole, number: int, num_tokens: int) -> Attempt:
    """Give the role a prompt that shares nothing with others."""
    tokens = tuple(range(1000 * number, 1000 * number + num_tokens))
    role.receive(Prefill(attempt_of(number), Request("r", tokens, SamplingParams(9, seed=0)), PEER))
    return attempt_of(number)


def compute(role: PrefillRole, num_tokens: int = 64) -> list[int]:
    """Run one step; return the numbers of the attempts that were in it. Every first token is its attempt's number."""
    chunks = role.schedule(num_tokens)
    for chunk in chunks:
        chunk.sequence.launch(chunk)
    for chunk in chunks:
        chunk.sequence.land(chunk)
        role.commit(chunk, [Drawn(chunk.sequence.attempt.number, None, is_valid=True)] * len(chunk.wanted))
    return [chunk.sequence.attempt.number for chunk in chunks]


def test_prefill_computes_ahead_of_grants_up_to_its_limit_and_granted_prompts_beyond() -> None:
    role, around, pool = prefill_role(num_blocks=8, outbox_share=0.5)
    first, *_, last = [prompt(role, number, 8) for number in (1, 2, 3, 4)]
    assert compute(role) == [1, 2]
    assert compute(role) == []
    role.receive(Grant(last, 0))
    assert compute(role) == [4]
    role.receive(Grant(first, 0))
    assert compute(role) == [3]
    assert pool.counts.held == 8
    assert [update.token_id for update in around.updates] == [1, 2, 4, 3]


def test_without_an_outbox_prefill_waits_for_grants() -> None:
    role, _, _ = prefill_role(num_blocks=8, outbox_share=0.0)
    attempts = [prompt(role, number, 8) for number in (1, 2)]
    assert compute(role) == []
    role.receive(Grant(attempts[1], 0))
    assert compute(role) == [2]


def test_the_youngest_prompts_without_a_grant_give_way_to_one_that_has_it() -> None:
    role, around, pool = prefill_role(num_blocks=6)
    attempts = [prompt(role, number, 8) for number in (1, 2, 3, 4)]
    assert compute(role) == [1, 2, 3]
    role.receive(Grant(attempts[3], 0))
    assert compute(role) == [4]
    assert role.counters["prompts_given_up"] == 1
    role.receive(Grant(attempts[2], 0))
    assert compute(role) == [3]
    assert role.counters["prompts_given_up"] == 2, "2 made way for 3, and 1 was left alone"
    assert [update.token_id for update in around.updates] == [1, 2, 3, 4], "a first token was sent twice"
    handoffs = [message for message in around.sent if isinstance(message, Handoff)]
    assert [(handoff.attempt.number, handoff.first_token_id) for handoff in handoffs] == [(4, 4), (3, 3)]
    assert pool.counts.held == 6


def test_a_granted_prompt_waits_neither_for_a_place_nor_for_the_tokens_of_a_step() -> None:
    role, _, _ = prefill_role(num_blocks=20, max_computing=1)
    attempts = [prompt(role, number, 8) for number in (1, 2, 3)]
    assert compute(role, 4) == [1]
    role.receive(Grant(attempts[2], 0))
    assert compute(role, 4) == [3]
    assert compute(role, 16) == [3]
    assert compute(role, 16) == [1]
    assert compute(role, 16) == [2]


def test_nothing_is_given_up_in_vain() -> None:
    role, _, _ = prefill_role(num_blocks=6)
    attempts = [prompt(role, number, size) for number, size in ((1, 12), (2, 8), (3, 20))]
    role.receive(Grant(attempts[0], 0))
    assert compute(role) == [1, 2]
    role.receive(Grant(attempts[2], 0))
    assert compute(role) == []
    assert role.counters["prompts_given_up"] == 0, "three blocks are being sent, so five cannot be had yet"
    role.receive(Committed(attempts[0]))
    assert compute(role) == [3]
    assert role.counters["prompts_given_up"] == 1


def test_what_was_given_up_while_its_step_was_under_way_is_drawn_once_more_and_sent_once() -> None:
    role, around, _ = prefill_role(num_blocks=2)
    attempts = [prompt(role, number, 8) for number in (1, 2)]
    (under_way,) = role.schedule(64)
    under_way.sequence.launch(under_way)
    role.receive(Grant(attempts[1], 0))
    (chunk,) = role.schedule(64)
    assert chunk.sequence.attempt == attempts[1]
    under_way.sequence.land(under_way)
    role.commit(under_way, [Drawn(1, None, is_valid=True)])
    assert around.updates == []
    role.receive(Abort(attempts[1]))
    assert compute(role) == [1]
    assert [update.token_id for update in around.updates] == [1]


def reserve(role: DecodeRole, number: int, num_tokens: int, max_tokens: int) -> None:
    role.receive(Reserve(attempt_of(number), request_of(num_tokens, max_tokens), PEER))


def test_decode_reserves_some_growth_for_those_it_could_park_and_all_for_others() -> None:
    role, _, pool = decode_role(30, Growth(growth_tokens=4, max_parked_blocks=10))
    for number, held in ((1, 2), (2, 4), (3, 9)):
        reserve(role, number, 4, 17)  # five blocks in the end
        assert pool.counts.held == held
    role.receive(Abort(attempt_of(1)))
    assert pool.counts.held == 7
    reserve(role, 4, 4, 17)
    assert pool.counts.held == 9, "what was booked for the first one is free again"


def test_decode_refuses_at_once_what_can_never_fit_and_serves_the_next() -> None:
    role, around, pool = decode_role(num_blocks=4)
    role.receive(Reserve(attempt_of(1), request_of(15, 3), PEER))
    (failed,) = around.sent
    assert isinstance(failed, Failed)
    assert (failed.code, pool.counts.held) == ("kv_cache_too_small", 0)
    role.receive(Reserve(attempt_of(2), request_of(15, 2), PEER))
    assert pool.counts.held == 4


def test_prefill_refuses_at_once_what_can_never_fit() -> None:
    role, around, _ = prefill_role(num_blocks=4)
    prompt(role, 1, 17)
    (failed,) = around.sent
    assert isinstance(failed, Failed)
    assert failed.code == "kv_cache_too_small"
    assert role.num_waiting == 0


def test_decode_takes_a_second_reserve_of_an_attempt_for_the_first_at_every_stage() -> None:
    role, around, pool = decode_role(num_blocks=4)
    first, waiting = (Reserve(attempt_of(number), request_of(8, 5), PEER) for number in (1, 2))
    for reserve in (first, waiting, first, waiting):
        role.receive(reserve)
    assert (role.num_waiting, pool.counts.held) == (2, 3)
    for rank in (0, 1):
        role.heed(Expecting(rank, attempt_of(1)))
    role.receive(first)
    assert around.sent == [Grant(attempt_of(1), 0)]
    role.receive(Abort(attempt_of(2)))
    role.receive(Abort(attempt_of(1)))
    assert (role.num_waiting, pool.counts.held) == (0, 0)
    assert role.counters["duplicate_requests"] == 3


def test_prefill_takes_a_second_prefill_of_an_attempt_for_the_first_at_every_stage() -> None:
    role, around, pool = prefill_role(num_blocks=8)
    attempt = prompt(role, 1, 8)
    prompt(role, 1, 8)
    assert compute(role) == [1]
    prompt(role, 1, 8)
    assert compute(role) == []
    role.receive(Grant(attempt, 0))
    prompt(role, 1, 8)
    assert [type(message) for message in around.sent] == [Handoff]
    assert len(around.updates) == 1
    role.receive(Committed(attempt))
    assert (role.num_waiting, role.num_running, pool.counts.held) == (0, 0, 0)
    assert role.counters["duplicate_requests"] == 3


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


def fetching_role(num_held_tokens: int, grant: Grant | None = None) -> tuple[PrefillRole, Surroundings, BlockPool]:
    """A prefill role of two ranks with one prompt of 30 tokens, told that decode holds so many."""
    pool, around = BlockPool(10, 4), Surroundings()
    fetcher = RemoteFetcher(around, around, min_tokens=8)
    role = PrefillRole(pool, RemoteOutbox(pool, around, LAYOUT, 1.0), fetcher, around, "model", 8)
    role.receive(Prefill(attempt_of(1), request_of(30, 5), PEER, num_held_tokens))
    if grant:
        role.receive(grant)
    return role, around, pool


def test_prefill_computes_at_once_when_nothing_says_that_waiting_would_pay() -> None:
    role, _, _ = fetching_role(num_held_tokens=7)
    assert [(chunk.start, chunk.end) for chunk in role.schedule(100)] == [(0, 30)]


def test_prefill_waits_for_a_grant_that_seems_to_pay_and_computes_when_it_does_not() -> None:
    role, around, _ = fetching_role(num_held_tokens=8)
    assert role.schedule(100) == []
    role.receive(Grant(attempt_of(1), 4))
    assert [(chunk.start, chunk.end) for chunk in role.schedule(100)] == [(0, 30)]
    assert around.orders == [SendBlocks(attempt_of(1), PEER, tuple(range(8)), 4, 26, 0)]


def test_prefill_fetches_when_all_ranks_expect_and_computes_the_rest_when_all_have_received() -> None:
    role, around, pool = fetching_role(0, Grant(attempt_of(1), 24))
    assert role.schedule(100) == []
    assert around.orders == [ExpectBlocks(attempt_of(1), PEER, tuple(range(8)), 0, 24)]
    role.heed(Expecting(1, attempt_of(1)))
    assert around.sent == []
    role.heed(Expecting(0, attempt_of(1)))
    assert around.sent == [Fetch(attempt_of(1), 0, 24)]
    role.heed(Received(0, attempt_of(1)))
    assert role.schedule(100) == []
    role.heed(Received(1, attempt_of(1)))
    assert [(chunk.start, chunk.end) for chunk in role.schedule(100)] == [(24, 30)]
    assert role.counters["fetched_tokens"] == 24
    role.receive(Abort(attempt_of(1)))
    assert pool.counts.held == 0


@pytest.mark.parametrize("says", [Unfetched(attempt_of(1), "x"), FetchBroken(0, attempt_of(1), "x")], ids=["it", "we"])
def test_prefill_computes_from_where_it_was_when_a_fetch_fails_and_ranks_drop_it_first(says) -> None:
    role, around, _ = fetching_role(0, Grant(attempt_of(1), 24))
    role.schedule(100)
    role.heed(Expecting(0, attempt_of(1)))
    role.heed(Expecting(1, attempt_of(1)))
    role.receive(says) if isinstance(says, Unfetched) else role.heed(says)
    assert around.orders[-1] == DropTransfer(attempt_of(1))
    assert [(chunk.start, chunk.end) for chunk in role.schedule(100)] == [(0, 30)]
    role.heed(Received(0, attempt_of(1)))
    role.heed(FetchBroken(1, attempt_of(1), "late"))
    assert role.counters["failed_fetches"] == 1


def test_a_grant_that_comes_in_the_middle_of_a_prompt_fetches_what_is_not_computed_yet() -> None:
    role, around, _ = fetching_role(0)
    (chunk,) = role.schedule(10)
    chunk.sequence.launch(chunk)
    role.receive(Grant(attempt_of(1), 24))
    assert role.schedule(10) == []
    assert around.orders == [ExpectBlocks(attempt_of(1), PEER, tuple(range(8)), 10, 14)]
    chunk.sequence.land(chunk)
    role.commit(chunk, [])
    assert len(around.orders) == 1, "nothing is handed off while something is fetched"
    for report in (Expecting, Received):
        for rank in range(2):
            role.heed(report(rank, attempt_of(1)))
    assert [(chunk.start, chunk.end) for chunk in role.schedule(100)] == [(24, 30)]


def test_decode_sends_what_it_holds_and_refuses_to_send_more() -> None:
    role, around, pool = decode_role(num_blocks=40)
    names = HashChain(chain_root("model", ""), 4).of(range(30), 29)
    earlier = pool.acquire([], 8)
    assert earlier
    pool.name_blocks(earlier, names)
    earlier.release()
    role.receive(Reserve(attempt_of(1), request_of(30, 5), PEER))
    role.receive(Fetch(attempt_of(1), 0, 28))
    assert len(around.orders) == 1, "nothing is sent before the grant"
    for rank in range(2):
        role.heed(Expecting(rank, attempt_of(1)))
    assert around.sent.pop() == Grant(attempt_of(1), 28)
    for first, num_tokens in ((0, 29), (28, 1), (-1, 5), (5, 0)):
        role.receive(Fetch(attempt_of(1), first, num_tokens))
        assert isinstance(around.sent.pop(), Unfetched)
    for _ in range(2):
        role.receive(Fetch(attempt_of(1), 4, 24))
    assert [type(order) for order in around.orders] == [ExpectBlocks, SendBlocks], "what is asked twice is sent once"
    assert role.counters["duplicate_requests"] == 1
    order = around.orders[-1]
    assert isinstance(order, SendBlocks)
    assert (order.destination, order.first_position, order.num_tokens) == (PEER, 4, 24)
    role.heed(FetchBroken(1, attempt_of(1), "a frame was broken"))
    assert around.sent.pop() == Unfetched(attempt_of(1), "sending KV failed on rank 1: a frame was broken")
    assert pool.counts.held, "the attempt itself goes on"


def test_a_rank_that_expects_frames_wakes_whoever_waits_to_say_so() -> None:
    """Otherwise a leader that admits a waiting reservation sleeps until its next heartbeat before it grants."""
    wakes: list[bool] = []
    transport = SimulatedReceiver(KVNetwork(Clock(), None), "here", lambda: wakes.append(True))
    receiver = KVReceiver(RankCache.empty(LAYOUT, 0, 4).planes, LAYOUT, 0, transport)
    mover = ReceivingMover(receiver, 0)
    mover.execute(ExpectBlocks(attempt_of(1), PEER, (0, 1), 0, 5))
    assert wakes
    assert transport.arrivals.is_readable
    assert mover.poll() == [Expecting(0, attempt_of(1))]
