"""One batch as tensors: what a leader ordered in token counts and block ids, as the model reads it.

Every rank makes its own from the same order, once per step. Knows nothing of requests.
"""

from array import array
from dataclasses import dataclass
from itertools import chain, takewhile

import torch
from torch import Tensor

from engine.host_copy import upload
from protocol.orders import Batch


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """The first num_decodes sequences have one token each, so the first num_decodes tokens are theirs."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slots: Tensor  # int64 [num_tokens]
    block_tables: Tensor  # int32 [num_sequences, max_blocks], rows filled up with block 0
    context_lens: Tensor  # int32 [num_sequences]
    num_decodes: int
    query_starts: Tensor  # int32 [num_sequences - num_decodes + 1], from the first token that is not a decode's
    sampled_tokens: Tensor  # int64 [num_sampled], the index of each sampled chunk's last token


def to_tensors(batch: Batch, block_size: int, device: torch.device) -> BatchTensors:
    """Lay out batch; carried tokens are still 0. Raise ValueError when a block table is too short for its context."""
    query_lens = _int64(batch.query_lens)
    context_lens = _int64(batch.context_lens)
    block_tables = _padded(_used_blocks(batch, block_size))
    query_ends = query_lens.cumsum(0)
    num_tokens = len(batch.token_ids)
    positions = torch.arange(num_tokens) + (context_lens - query_ends).repeat_interleave(query_lens)
    sequences = torch.arange(len(query_lens)).repeat_interleave(query_lens)
    slots = block_tables[sequences, positions // block_size] * block_size + positions % block_size
    num_decodes = sum(1 for _ in takewhile(lambda length: length == 1, batch.query_lens))
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), query_ends[num_decodes:] - num_decodes))
    sampled_tokens = query_ends[_int64(batch.sampled)] - 1
    wide = upload([_int64(batch.token_ids), positions, slots, sampled_tokens], device)
    narrow = upload([block_tables.int(), context_lens.int(), starts.int()], device)
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


def _used_blocks(batch: Batch, block_size: int) -> list[tuple[int, ...]]:
    """Return each block table as far as its context reaches; a table may hold room for tokens to come."""
    used = []
    for index, (table, context_len) in enumerate(zip(batch.block_tables, batch.context_lens, strict=True)):
        num_blocks = -(-context_len // block_size)
        if len(table) < num_blocks:
            have = f"{context_len} tokens and {len(table)} blocks of {block_size}"
            raise ValueError(f"sequence {index} has {have}; it needs {num_blocks}")
        used.append(table[:num_blocks])
    return used


def _padded(tables: list[tuple[int, ...]]) -> Tensor:
    """Return the tables as int64 [num_sequences, max_blocks], filled up with zeros."""
    lengths = _int64([len(table) for table in tables])
    width = max((len(table) for table in tables), default=0)
    padded = torch.zeros(len(tables), width, dtype=torch.int64)
    padded[torch.arange(width) < lengths.unsqueeze(1)] = _int64(chain.from_iterable(tables))
    return padded


def _int64(numbers: "chain[int] | tuple[int, ...] | list[int]") -> Tensor:
    """array parses Python integers several times faster than torch.tensor does."""
    values = array("q", numbers)
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
