"""The blocks of one group's KV cache: who holds them, and which content the unheld ones still have.

A block is in one of three states: held (by at least one Hold), cached (held by nobody, but its content has a name and
may be taken up again), free. Roles acquire holds and release them; nothing else ever frees a block. The pool deals in
numbers only: the tensors are engine/kv_cache.py's.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence as SequenceOf

from protocol.messages import BlockCounts
from protocol.orders import block_table


class Hold:
    """A claim on blocks, in the order of a block table. The first num_cached of them already have their content.

    table: block_ids once more, as batches carry them (protocol.orders.block_table).
    """

    def __init__(self, pool: "BlockPool", block_ids: tuple[int, ...], num_cached: int) -> None:
        self._pool = pool
        self._is_released = False
        self.block_ids = block_ids
        self.table = block_table(block_ids)
        self.num_cached = num_cached

    def share(self) -> "Hold":
        """Return a second claim on the same blocks: they stay held until both are released."""
        assert not self._is_released, "a released hold cannot be shared"
        return self._pool._hold(self.block_ids, self.num_cached)

    def grow(self, num_blocks: int) -> bool:
        """Hold num_blocks more behind the others; False, and nothing has changed, when too few are left."""
        assert not self._is_released, "a released hold cannot grow"
        more = self._pool.acquire((), num_blocks)
        if more is not None:
            self.block_ids += more.block_ids
            self.table += more.table
        return more is not None

    def release(self) -> None:
        """Let go. A second release is a mistake in the program."""
        assert not self._is_released, "hold released twice"
        self._is_released = True
        self._pool._release(self.block_ids)


class BlockPool:
    """Hands out holds on num_blocks blocks; remembers named content until its block is needed for something else."""

    def __init__(self, num_blocks: int, block_size: int, is_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_caching = is_caching
        self._num_holds = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._block_of_name: dict[bytes, int] = {}
        self._name_of_block: dict[int, bytes] = {}

    @property
    def counts(self) -> BlockCounts:
        """Return how many blocks are in each state."""
        free, cached = len(self._free), len(self._cached)
        return BlockCounts(self.num_blocks, free, cached, self.num_blocks - free - cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks num_tokens need."""
        return -(-num_tokens // self.block_size)

    def acquire(self, names: SequenceOf[bytes], num_blocks: int) -> Hold | None:
        """Hold num_blocks blocks, first those with the longest known run of names; None when too few are left.

        names: the content that the holder wants, block after block from position 0; at most num_blocks names.
        """
        assert len(names) <= num_blocks
        if not self.would_fit(names, num_blocks):
            return None
        known = self._known_run(names)
        for block in known:
            self._cached.pop(block, None)
        fresh = [self._take_block() for _ in range(num_blocks - len(known))]
        return self._hold((*known, *fresh), len(known))

    def would_fit(self, names: SequenceOf[bytes], num_blocks: int, without: SequenceOf[Hold] = ()) -> bool:
        """Whether acquire would return a hold if those in without were released first."""
        known = set(self._known_run(names))
        num_evictable = len(self._cached) - len(self._cached.keys() & known)
        released = Counter(block for hold in without for block in hold.block_ids)
        num_released = sum(self._num_holds[block] == num for block, num in released.items() if block not in known)
        return num_blocks - len(known) <= len(self._free) + num_evictable + num_released

    def name_blocks(self, hold: Hold, names: SequenceOf[bytes]) -> None:
        """Say that the first len(names) blocks of hold now have this content. Content that is known keeps its block."""
        if not self._is_caching:
            return
        for block, name in zip(hold.block_ids, names, strict=False):
            if block not in self._name_of_block and name not in self._block_of_name:
                self._name_of_block[block] = name
                self._block_of_name[name] = block

    def check(self) -> None:
        """Assert everything that must be true of a pool between two operations. For tests."""
        held = {block for block, holds in enumerate(self._num_holds) if holds}
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not held & {*self._free, *self._cached}, "a held block is free or cached"
        assert not set(self._free) & set(self._cached), "a block is free and cached"
        assert len(held) + len(self._free) + len(self._cached) == self.num_blocks, "a block is lost"
        assert {name: block for block, name in self._name_of_block.items()} == self._block_of_name
        assert set(self._cached) <= set(self._name_of_block), "a cached block has no name"
        assert not set(self._free) & set(self._name_of_block), "a free block has a name"

    def _known_run(self, names: SequenceOf[bytes]) -> list[int]:
        run: list[int] = []
        for name in names:
            block = self._block_of_name.get(name)
            if block is None:
                break
            run.append(block)
        return run

    def _take_block(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        del self._block_of_name[self._name_of_block.pop(block)]
        return block

    def _hold(self, block_ids: tuple[int, ...], num_cached: int) -> Hold:
        for block in block_ids:
            self._num_holds[block] += 1
        return Hold(self, block_ids, num_cached)

    def _release(self, block_ids: tuple[int, ...]) -> None:
        """Last blocks first, so that the end of a prefix is forgotten before its beginning."""
        for block in reversed(block_ids):
            self._num_holds[block] -= 1
            assert self._num_holds[block] >= 0
            if self._num_holds[block]:
                continue
            if block in self._name_of_block:
                self._cached[block] = None
            else:
                self._free.append(block)
