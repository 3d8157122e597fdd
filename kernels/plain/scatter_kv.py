"""scatter_kv in plain torch: one contiguous payload -> blocks of a paged KV cache; the inverse of gather_kv.

Called by kv_transfer on the receiving side, on the thread that owns the cache, after a payload has been checked.
"""

from collections.abc import Iterator

import torch

from kernels.plain.gather_kv import block_spans


def scatter_kv(
    payload: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
    tokens: tuple[int, int],
) -> None:
    """Copy a payload into a range of layers, local heads and token positions of the cache; nothing else is written.

    payload: [num_layers, 2, num_heads, num_tokens, head_dim], on the cache's device, or as many elements or bytes
    (uint8) in any shape. block_table: int64, [num_blocks of the prompt], from position 0. Other shapes as in gather_kv.
    Neighbouring blocks are copied as one: on a CPU that is two to five times as fast as an indexed copy.
    """
    block_size, head_dim = cache.shape[-2:]
    sizes = (layers[1] - layers[0], 2, heads[1] - heads[0], tokens[1] - tokens[0], head_dim)
    shaped = payload.contiguous().view(cache.dtype).view(sizes)
    target = cache[layers[0] : layers[1], :, :, heads[0] : heads[1]].transpose(2, 3)  # [layers, 2, heads, blocks, ...]
    for blocks, slots, part in block_spans(tokens, block_size):
        shape = (blocks[1] - blocks[0], slots[1] - slots[0])
        source = shaped[:, :, :, part[0] : part[1]].unflatten(3, shape)
        for index, block_id, length in _runs(block_table[blocks[0] : blocks[1]].tolist()):
            run = target[:, :, :, block_id : block_id + length, slots[0] : slots[1]]
            run.copy_(source[:, :, :, index : index + length])


def _runs(block_ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, first block id, length) of every run of consecutive block ids."""
    start = 0
    for index in range(1, len(block_ids) + 1):
        if index == len(block_ids) or block_ids[index] != block_ids[index - 1] + 1:
            yield start, block_ids[start], index - start
            start = index
