"""The block pool against a plain model of it: no block twice, none lost, cached content is what its name says."""

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine.block_pool import BlockPool, Hold
from engine.prefix_hash import HashChain, chain_root

BLOCK_SIZE = 4
NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Sequences over a tiny alphabet, so that prefixes collide often. content: what was last written to each block."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.content: dict[int, tuple[int, ...]] = {}
        self.live: list[Hold] = []

    @rule(target=holds, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24), growth=st.integers(0, 8))
    def acquire(self, tokens: list[int], growth: int) -> object:
        names = HashChain(chain_root("model", ""), BLOCK_SIZE).of(tokens, len(tokens))
        num_blocks = self.pool.blocks_for(len(tokens) + growth)
        before = self.pool.counts
        hold = self.pool.acquire(names, num_blocks)
        if hold is None:
            assert self.pool.counts == before, "a refused hold took something"
            return multiple()
        assert len(set(hold.block_ids)) == num_blocks
        self._check_cached(hold, tokens)
        self._compute(hold, tokens)
        self.pool.name_blocks(hold, names)
        self.live.append(hold)
        return hold

    def _check_cached(self, hold: Hold, tokens: list[int]) -> None:
        for index, block in enumerate(hold.block_ids[: hold.num_cached]):
            assert self.content[block] == tuple(tokens[: (index + 1) * BLOCK_SIZE]), "a cached block holds other tokens"

    def _compute(self, hold: Hold, tokens: list[int]) -> None:
        others = {block for other in self.live for block in other.block_ids}
        for index, block in enumerate(hold.block_ids[hold.num_cached :], hold.num_cached):
            assert block not in others, "a block that somebody holds was given out as fresh"
            self.content[block] = tuple(tokens[: (index + 1) * BLOCK_SIZE])

    @rule(target=holds, hold=holds)
    def share(self, hold: Hold) -> Hold:
        self.live.append(hold.share())
        return self.live[-1]

    @rule(hold=holds, num_blocks=st.integers(0, 3))
    def grow(self, hold: Hold, num_blocks: int) -> None:
        before, counts = hold.block_ids, self.pool.counts
        if not hold.grow(num_blocks):
            assert (hold.block_ids, self.pool.counts) == (before, counts), "a hold that did not grow has changed"
            return
        fresh = set(hold.block_ids[len(before) :])
        assert hold.block_ids[: len(before)] == before
        assert len(fresh) == num_blocks
        assert not fresh & {block for other in self.live if other is not hold for block in other.block_ids}
        for block in fresh:
            self.content[block] = ()

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40))
    def foresee(self, data: st.DataObject, tokens: list[int]) -> None:
        """would_fit says what would come of releasing some holds and acquiring then."""
        indices = data.draw(st.sets(st.sampled_from(range(len(self.live))))) if self.live else set()
        names = HashChain(chain_root("model", ""), BLOCK_SIZE).of(tokens, len(tokens))
        num_blocks = self.pool.blocks_for(len(tokens))
        foreseen = self.pool.would_fit(names, num_blocks, [self.live[index] for index in indices])
        pool, live = copy.deepcopy((self.pool, self.live))
        for index in indices:
            live[index].release()
        assert foreseen == (pool.acquire(names, num_blocks) is not None)

    @rule(hold=consumes(holds))
    def release(self, hold: Hold) -> None:
        self.live.remove(hold)
        hold.release()

    @invariant()
    def pool_is_sound(self) -> None:
        self.pool.check()
        counts = self.pool.counts
        assert counts.free + counts.cached + counts.held == counts.total == NUM_BLOCKS
        assert counts.held == len({block for hold in self.live for block in hold.block_ids})

    def teardown(self) -> None:
        for hold in self.live:
            hold.release()
        assert self.pool.counts.held == 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def names_of(tokens: list[int], salt: str = "") -> list[bytes]:
    return HashChain(chain_root("model", salt), BLOCK_SIZE).of(tokens, len(tokens))


def test_a_released_prefix_is_found_again_until_its_blocks_are_needed() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    names = names_of(list(range(8)))
    first = pool.acquire(names, 2)
    assert first is not None
    assert first.num_cached == 0
    pool.name_blocks(first, names)
    first.release()
    assert pool.counts.cached == 2
    again = pool.acquire(names, 3)
    assert again is not None
    assert again.num_cached == 2
    assert again.block_ids[:2] == first.block_ids
    again.release()
    everything = pool.acquire([], 4)
    assert everything is not None
    everything.release()
    forgotten = pool.acquire(names, 2)
    assert forgotten is not None
    assert forgotten.num_cached == 0


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    names = names_of(list(range(12)))
    hold = pool.acquire(names, 3)
    assert hold is not None
    pool.name_blocks(hold, names)
    hold.release()
    one = pool.acquire([], 1)
    assert one is not None
    rest = pool.acquire(names[:2], 2)
    assert rest is not None
    assert rest.num_cached == 2


def test_salts_separate_equal_tokens_and_models_separate_equal_salts() -> None:
    tokens = list(range(8))
    assert names_of(tokens, "a") != names_of(tokens, "b")
    assert chain_root("model-a", "x") != chain_root("model-b", "x")
    assert chain_root("ab", "c") != chain_root("a", "bc")


def test_without_caching_nothing_is_remembered() -> None:
    pool = BlockPool(2, BLOCK_SIZE, is_caching=False)
    names = names_of(list(range(8)))
    hold = pool.acquire(names, 2)
    assert hold is not None
    pool.name_blocks(hold, names)
    hold.release()
    assert pool.counts.free == 2
    assert pool.counts.cached == 0


def test_a_second_release_is_refused() -> None:
    pool = BlockPool(1, BLOCK_SIZE)
    hold = pool.acquire([], 1)
    assert hold is not None
    hold.release()
    with pytest.raises(AssertionError):
        hold.release()


def test_a_hash_chain_grows_to_what_it_would_be_if_computed_at_once() -> None:
    tokens = [7 * i % 13 for i in range(50)]
    grown = HashChain(chain_root("model", ""), BLOCK_SIZE)
    for end in range(1, 51):
        grown.of(tokens[:end], end)
    assert grown.of(tokens, 50) == names_of(tokens)
