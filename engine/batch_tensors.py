"""One batch as tensors: what a leader ordered in token counts and block ids, as the model reads it.

Every rank makes its own from the same order, once per step, and a step of few tokens is over quickly: so the sums are
done in numpy, whose calls cost a fraction of torch's on arrays this small. Knows nothing of requests.
"""

from itertools import takewhile
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.upload import upload
from models.inputs import BatchTensors
from protocol.orders import BLOCK_ID_BYTES, Batch

Integers: TypeAlias = NDArray[np.int64]


def to_tensors(batch: Batch, block_size: int, device: torch.device) -> BatchTensors:
    """Lay out batch; carried tokens are still 0. Raise ValueError when a block table is too short for its context."""
    query_lens, context_lens = _integers(batch.query_lens), _integers(batch.context_lens)
    block_tables = _block_tables(batch, -(-context_lens // block_size), block_size)
    query_ends = query_lens.cumsum()
    sequences = np.arange(len(query_lens)).repeat(query_lens)  # of each token
    positions = np.arange(len(batch.token_ids)) + (context_lens - query_ends)[sequences]
    blocks = block_tables[sequences, positions // block_size].astype(np.int64)
    slots = blocks * block_size + positions % block_size
    num_decodes = sum(1 for _ in takewhile(lambda length: length == 1, batch.query_lens))
    query_starts = np.concatenate(([0], query_ends[num_decodes:] - num_decodes))
    token_ids, sampled_tokens = _integers(batch.token_ids), _integers(batch.sampled)
    wide = upload([torch.from_numpy(x) for x in (token_ids, positions, slots, sampled_tokens)], device)
    lens, starts = context_lens.astype(np.int32), query_starts.astype(np.int32)
    narrow = upload([torch.from_numpy(x) for x in (block_tables, lens, starts)], device)
    return BatchTensors(
        token_ids=wide[0],
        positions=wide[1],
        slots=wide[2],
        sampled_tokens=wide[3],
        block_tables=narrow[0],
        context_lens=narrow[1],
        query_starts=narrow[2],
        num_decodes=num_decodes,
    )


def _block_tables(batch: Batch, num_blocks: Integers, block_size: int) -> NDArray[np.int32]:
    """Return each block table as far as its context reaches, filled up with zeros: [num_sequences, max_blocks].

    A table may hold room for tokens to come.
    """
    padded = np.zeros((len(num_blocks), num_blocks.max(initial=0)), np.int32)
    for index, (table, used) in enumerate(zip(batch.block_tables, num_blocks.tolist(), strict=True)):
        if len(table) < used * BLOCK_ID_BYTES:
            have = f"{batch.context_lens[index]} tokens and {len(table) // BLOCK_ID_BYTES} blocks of {block_size}"
            raise ValueError(f"sequence {index} has {have}; it needs {used}")
        padded[index, :used] = np.frombuffer(table, np.int32, used)
    return padded


def _integers(numbers: tuple[int, ...]) -> Integers:
    return np.array(numbers, np.int64)
