"""CUDA graphs of decode steps, so that the host launches one thing instead of hundreds. Built and asked by the engine.

There is one graph for each of several batch sizes, and a batch runs in the smallest that holds it; rows left over read
and write the scratch block. Lengths and block tables are read from memory on the device, so one graph serves contexts
of every length. What is captured, and how, is given from outside: nothing here knows the model.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.inputs import BatchTensors

Compute = Callable[[BatchTensors], Tensor | None]
Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Takes work on tensors that stay in their places; returns what repeats it."""


def padded_sizes(max_size: int) -> list[int]:
    """Return the batch sizes that get a graph: few rows left over, and not too many graphs."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_size + 32, 32)]
    return [size for size in sizes if size < max_size] + [max_size]


class DecodeGraphs:
    """Graphs for batches of up to max(sizes) sequences of one token each, all of them sampled."""

    def __init__(
        self,
        forward: Compute,
        sizes: Iterable[int],
        max_blocks: int,
        scratch: "Scratch",
        logits: Tensor | None,
        capture: Capture,
    ) -> None:
        """max_blocks: the blocks of the longest context. logits: float32 [max(sizes), vocab_size], where all graphs
        leave theirs, so that none needs memory of its own for them; None where forward returns none.

        Largest first, so that smaller graphs fit into its memory.
        """
        self._sizes = sorted(sizes)
        self._scratch = scratch
        self._forward = forward
        self._logits = logits
        self._inputs = _inputs(self._sizes[-1], max_blocks, scratch)
        self._replays = {size: capture(partial(self._compute, size)) for size in reversed(self._sizes)}

    def can_run(self, batch: BatchTensors) -> bool:
        """Whether a graph holds this batch."""
        num = len(batch.context_lens)
        return num == batch.num_decodes == len(batch.sampled_tokens) and 0 < num <= self._sizes[-1]

    def run(self, batch: BatchTensors) -> Tensor | None:
        """Return what forward returns for batch, as float32; it stays as it is until the next run."""
        num = batch.num_decodes
        size = next(size for size in self._sizes if size >= num)
        inputs = self._inputs
        inputs.token_ids[:num] = batch.token_ids
        inputs.positions[:num] = batch.positions
        inputs.slots[:num] = batch.slots
        inputs.context_lens[:num] = batch.context_lens
        inputs.block_tables[:num, : batch.block_tables.shape[1]] = batch.block_tables
        if num < size:
            self._scratch.fill(_rows(inputs, num, size))
        self._replays[size]()
        return None if self._logits is None else self._logits[:num]

    def _compute(self, size: int) -> None:
        computed = self._forward(_rows(self._inputs, 0, size))
        if computed is not None and self._logits is not None:
            self._logits[:size].copy_(computed)


class Scratch:
    """A block that belongs to nobody: rows that are there to fill up a batch compute a context of one token in it."""

    def __init__(self, block: int, block_size: int, device: torch.device) -> None:
        self.device = device
        self._block = block
        self._slot = block * block_size

    def fill(self, rows: BatchTensors) -> None:
        """Make these rows harmless."""
        rows.positions.zero_()
        rows.slots.fill_(self._slot)
        rows.context_lens.fill_(1)
        rows.block_tables[:, :1].fill_(self._block)


def _inputs(size: int, max_blocks: int, scratch: Scratch) -> BatchTensors:
    """Return tensors for size sequences, all of them filling."""
    long = torch.zeros(4, size, dtype=torch.int64, device=scratch.device)
    inputs = BatchTensors(
        token_ids=long[0],
        positions=long[1],
        slots=long[2],
        block_tables=torch.zeros(size, max_blocks, dtype=torch.int32, device=scratch.device),
        context_lens=torch.zeros(size, dtype=torch.int32, device=scratch.device),
        num_decodes=size,
        query_starts=torch.zeros(1, dtype=torch.int32, device=scratch.device),
        sampled_tokens=torch.arange(size, device=scratch.device),
    )
    scratch.fill(inputs)
    return inputs


def _rows(inputs: BatchTensors, start: int, stop: int) -> BatchTensors:
    """Return a view of some sequences."""
    return BatchTensors(
        token_ids=inputs.token_ids[start:stop],
        positions=inputs.positions[start:stop],
        slots=inputs.slots[start:stop],
        block_tables=inputs.block_tables[start:stop],
        context_lens=inputs.context_lens[start:stop],
        num_decodes=stop - start,
        query_starts=inputs.query_starts,
        sampled_tokens=inputs.sampled_tokens[start:stop],
    )


def cuda_capture() -> Capture:
    """Return a capture into CUDA graphs that share one pool of memory, for no two of them ever run at once.

    All are made on one stream: for every stream that multiplies matrices torch keeps a workspace, tens of MiB large.
    """
    pool: Any = torch.cuda.graph_pool_handle()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(run: Work) -> Work:
        _run_on(aside, run)
        graph = torch.cuda.CUDAGraph()
        # Other threads (of NCCL, of a transport) may call CUDA meanwhile: only this thread's calls must keep the rules.
        with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
            run()
        return graph.replay

    return capture


def _run_on(aside: torch.cuda.Stream, run: Work) -> None:
    """Run once outside the graph: kernels are compiled and libraries take their workspaces, which no graph may do."""
    aside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(aside):
            run()
    finally:  # also when memory has run out: what it read may be let go of now
        torch.cuda.current_stream().wait_stream(aside)
