"""scatter_kv in plain torch: one contiguous payload -> blocks of a paged KV cache; the inverse of gather_kv.

Called by kv_transfer on the receiving side, on the thread that owns the cache, after a payload has been checked.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.plain.gather_kv import Range, block_spans, parts_of


def scatter_kv(
    payload: Tensor,
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
) -> None:
    """Copy a payload into a range of layers, local heads and token positions of the cache; nothing else is written.

    payload: what gather_kv returns, on the cache's device, or as many elements in any shape. Others as in gather_kv.
    Neighbouring blocks are copied as one: on a CPU that is two to five times as fast as an indexed copy.
    """
    for part, plane, (first, stop) in zip(parts_of(payload, planes, layers, heads, tokens), planes, heads, strict=True):
        named = plane.view(torch.uint8)[layers[0] : layers[1], :, first:stop]
        target = named.transpose(1, 2)  # [layers, heads, blocks, block_size, slot_bytes]
        for blocks, slots, place in block_spans(tokens, plane.shape[3]):
            shape = (blocks[1] - blocks[0], slots[1] - slots[0])
            source = part[:, :, place[0] : place[1]].unflatten(2, shape)
            for index, block_id, length in _runs(block_table[blocks[0] : blocks[1]].tolist()):
                run = target[:, :, block_id : block_id + length, slots[0] : slots[1]]
                run.copy_(source[:, :, index : index + length])


def _runs(block_ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, first block id, length) of every run of consecutive block ids."""
    start = 0
    for index in range(1, len(block_ids) + 1):
        if index == len(block_ids) or block_ids[index] != block_ids[index - 1] + 1:
            yield start, block_ids[start], index - start
            start = index
