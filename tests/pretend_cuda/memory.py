"""The pretended device's memory: how much there is, who has it, and that whoever reads what was freed finds rubbish.

As in torch, memory that was freed may be used again at once by what its own stream does next, and only after what other
streams had queued that were recorded. Here nothing is used again; it is overwritten instead, where the next owner could
have written, and new memory where the last one could. A graph's memory is its pool's while a graph of that pool lives.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.pretend_cuda.streams import Mark, Stream, Timeline, Work

_ROUNDED_TO = 512
_RUBBISH = 0x7FC0  # twice or more in a row: NaN in every floating-point type, and an index far beyond everything


@dataclass(eq=False)
class Pool:
    """Bytes that were taken from the device, and those of them that are in use."""

    reserved: int = 0
    used: int = 0


@dataclass(eq=False)
class Memory:
    """One allocation, as long as any tensor lies in it. graph: which was being captured when it was taken."""

    allocator: "Allocator"
    pool: Pool
    num_bytes: int
    storage: Tensor
    stream: Stream
    graph: Any
    users: set[Stream] = field(default_factory=set)

    def __del__(self) -> None:
        self.allocator.give_back(self)


class Allocator:
    """Memory of total bytes. fail_after: how many allocations more succeed, for tests of those that do not."""

    def __init__(self, timeline: Timeline, total: int) -> None:
        self._timeline = timeline
        self._total = total
        self._general = Pool()
        self._pools = weakref.WeakSet([self._general])
        self.fail_after: int | None = None
        self.num_taken = 0

    def new_pool(self) -> Pool:
        """Return one for graphs."""
        pool = Pool()
        self._pools.add(pool)
        return pool

    @property
    def free(self) -> int:
        """Bytes that belong to no pool."""
        return self._total - sum(pool.reserved for pool in self._pools)

    def info(self, device: object = None) -> tuple[int, int]:
        """As torch.cuda.mem_get_info."""
        return self.free, self._total

    def empty_cache(self) -> None:
        """As torch.cuda.empty_cache."""
        self._general.reserved = self._general.used

    def take(self, inner: Tensor) -> Memory:
        """Account for a new tensor, and fill it with rubbish. Raise OutOfMemoryError when there is no room."""
        graph = self._timeline.capture
        num_bytes = -(-inner.untyped_storage().nbytes() // _ROUNDED_TO) * _ROUNDED_TO
        with self._timeline.lock:
            pool = self._general if graph is None else graph.pool
            self._reserve(pool, num_bytes)
            pool.used += num_bytes
            stream = self._timeline.current_stream()
            memory = Memory(self, pool, num_bytes, _flat(inner), stream, graph and weakref.ref(graph))
            is_last_owner_busy = graph is not None or stream.is_busy
        spoil(memory.storage)
        if is_last_owner_busy:
            self._timeline.queue(_spoiling(memory.storage), stream)
        return memory

    def give_back(self, memory: Memory) -> None:
        """Its last tensor is gone."""
        with self._timeline.lock:
            memory.pool.used -= memory.num_bytes
            work, capture = _spoiling(memory.storage), self._timeline.capture
            if memory.graph is None:
                for stream in memory.users - {memory.stream}:
                    mark = _mark_in(stream, self._timeline)
                    self._timeline.put(Work(lambda: None, mark, is_upkeep=True), memory.stream)
                self._timeline.put(work, memory.stream)
            elif capture is not None and memory.graph() is capture:
                capture.record(work)

    def _reserve(self, pool: Pool, num_bytes: int) -> None:
        self.num_taken += 1
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.fail_after = None
                raise torch.OutOfMemoryError("CUDA out of memory, as this test wants it")
        grown = max(0, pool.used + num_bytes - pool.reserved)
        if grown > self.free:
            self.empty_cache()
        grown = max(0, pool.used + num_bytes - pool.reserved)
        if grown > self.free:
            raise torch.OutOfMemoryError(f"CUDA out of memory: tried to take {num_bytes} bytes, {self.free} are free")
        pool.reserved += grown


def spoil(storage: Tensor) -> None:
    """Fill memory, flat bytes, with rubbish."""
    whole = len(storage) // 2 * 2
    storage[:whole].view(torch.int16).fill_(_RUBBISH)


def _spoiling(storage: Tensor) -> Work:
    return Work(lambda: spoil(storage), is_upkeep=True)


def _flat(inner: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(inner.untyped_storage())


def _mark_in(stream: Stream, timeline: Timeline) -> Mark:
    """Mark what is queued so far, whatever is being captured."""
    mark = Mark()
    timeline.put(Work(mark.reach), stream)
    return mark
