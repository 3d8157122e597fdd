"""The loopback transport, held to what the conformance suite demands of the others, as far as it can break it.

Its two ends are one group with one cache, so both have the same tensor-parallel size and block size. Nothing travels:
there are no frames to cut, double or reorder, and no peer that could be killed or stopped without taking the other end
with it. What can go wrong is whose blocks they are: each test asserts that of the real inbox, outbox and block pool.
"""

from dataclasses import dataclass

import pytest
import torch

from decode_worker.inbox import LoopbackInbox
from engine.block_pool import BlockPool, Hold
from kv_transfer.transports.loopback import Loopback
from prefill_worker.outbox import LoopbackOutbox
from protocol.identity import Attempt, new_attempt, new_request_id
from protocol.layout import Endpoint
from protocol.messages import Reserve
from protocol.request import Request, SamplingParams
from tests.integration.kv_groups import NUM_BLOCKS, heads_of, layout, random_caches, random_tokens, write_tokens

EPOCH = 7
SHAPE = layout(1, 2)


@dataclass
class Colocated:
    """The KV side of a worker that plays both roles."""

    pool: BlockPool
    inbox: LoopbackInbox
    outbox: LoopbackOutbox

    @classmethod
    def of(cls, block_size: int = 16) -> "Colocated":
        loopback: Loopback[Hold] = Loopback()
        pool = BlockPool(NUM_BLOCKS, block_size)
        return cls(pool, LoopbackInbox(loopback), LoopbackOutbox(loopback))

    def reserve(self, num_tokens: int, names: tuple[bytes, ...] = ()) -> tuple[Attempt, Hold]:
        """The decode role's part: hold blocks, and let the prompt come into them."""
        attempt = new_attempt(new_request_id(), 0, EPOCH, EPOCH)
        hold = self.pool.acquire(names, self.pool.blocks_for(num_tokens))
        assert hold
        sampling = SamplingParams(max_tokens=1, seed=0)
        request = Request(attempt.request_id, tuple(range(num_tokens)), sampling)
        source = Endpoint(EPOCH, SHAPE, "loopback", ("",))
        self.inbox.expect(Reserve(attempt, request, source), hold, hold.num_cached * self.pool.block_size)
        return attempt, hold

    def claim(self, attempt: Attempt) -> Hold | None:
        """The prefill role's part. What it asks for itself does not matter: it computes into what decode holds."""
        return self.outbox.claim(attempt, (), 1)

    def is_whole(self) -> bool:
        self.pool.check()
        return self.pool.counts.held == 0


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_what_prefill_computes_is_in_decodes_blocks_on_every_rank(tensor_parallel, num_kv_heads, block_size):
    torch.manual_seed(0)
    shape, group = layout(tensor_parallel, num_kv_heads, block_size=block_size), Colocated.of(block_size)
    caches = random_caches(shape)
    for num_tokens in (100, 37, 16, 1):
        kv = random_tokens(num_kv_heads, num_tokens)
        attempt, reserved = group.reserve(num_tokens)
        computed = group.claim(attempt)
        assert computed
        before = [cache.clone() for cache in caches]
        for rank, cache in enumerate(caches):
            write_tokens(cache, shape, rank, list(computed.block_ids), 0, kv)
            arrived = torch.cat([cache[:, :, block] for block in reserved.block_ids], dim=3)[:, :, :, :num_tokens]
            assert torch.equal(arrived, kv[:, :, heads_of(shape, rank)])
            others = [block for block in range(NUM_BLOCKS) if block not in reserved.block_ids]
            assert torch.equal(cache[:, :, others], before[rank][:, :, others])
        computed.release()
        reserved.release()
    assert group.is_whole()


def test_many_prompts_at_once_do_not_mix_whatever_their_order():
    group = Colocated.of()
    reserved = dict(group.reserve(30) for _ in range(8))
    claimed = {attempt: group.claim(attempt) for attempt in reversed(list(reserved))}
    for attempt, hold in reserved.items():
        computed = claimed[attempt]
        assert computed
        assert computed.block_ids == hold.block_ids
        computed.release()
        hold.release()
    assert group.is_whole()


def test_an_attempt_is_taken_over_once_and_by_its_own_name_only():
    group = Colocated.of()
    attempt, hold = group.reserve(30)
    for changed in (
        new_attempt(attempt.request_id, 1, EPOCH, EPOCH),
        new_attempt(attempt.request_id, 0, EPOCH + 1, EPOCH),
        new_attempt(attempt.request_id, 0, EPOCH, EPOCH),
    ):
        assert group.claim(changed) is None, "another attempt, another life, another transfer"
    first = group.claim(attempt)
    assert first
    assert group.claim(attempt) is None
    first.release()
    hold.release()
    assert group.is_whole()


@pytest.mark.parametrize("prefill_first", [True, False])
def test_blocks_are_free_when_both_ends_have_let_go_and_not_before(prefill_first):
    """Neither end's abort may free blocks that the other still writes or reads."""
    group = Colocated.of()
    attempt, hold = group.reserve(30)
    computed = group.claim(attempt)
    assert computed
    first, last = (computed, hold) if prefill_first else (hold, computed)
    group.outbox.drop(attempt)
    group.inbox.drop(attempt)
    first.release()
    assert group.pool.counts.held == len(hold.block_ids)
    last.release()
    assert group.is_whole()


def test_what_decode_dropped_before_prefill_came_is_not_computed():
    group = Colocated.of()
    attempt, hold = group.reserve(30)
    group.inbox.drop(attempt)
    hold.release()
    assert group.claim(attempt) is None
    group.inbox.drop(attempt)
    assert group.is_whole()


def test_a_prefix_that_decode_holds_already_is_neither_sent_nor_computed_again():
    group = Colocated.of()
    names = (b"first", b"second")
    _, earlier = group.reserve(40)
    group.pool.name_blocks(earlier, names)
    earlier.release()
    attempt, hold = group.reserve(40, names)
    computed = group.claim(attempt)
    assert computed
    assert computed.num_cached == hold.num_cached == 2
    assert computed.block_ids[:2] == earlier.block_ids[:2]
