"""gather_kv in plain torch: blocks of a paged KV cache -> one contiguous payload.

Called by kv_transfer on the sending side. Knows local heads only; which heads those are is the plan's business.
"""

from collections.abc import Iterator

import torch


def gather_kv(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
    tokens: tuple[int, int],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Copy a range of layers, local heads and token positions out of the cache.

    cache: [num_layers, 2, num_blocks, num_local_kv_heads, block_size, head_dim]. block_table: int64 on the cache's
    device, [num_blocks of the prompt], from position 0. Ranges are half-open. Returns a contiguous
    [num_layers, 2, num_heads, num_tokens, head_dim] on the cache's device, or out when it is given: as many elements or
    bytes (uint8), contiguous, in any shape.
    """
    block_size, head_dim = cache.shape[-2:]
    source = cache[layers[0] : layers[1], :, :, heads[0] : heads[1]].transpose(2, 3)  # [layers, 2, heads, blocks, ...]
    shape = (*source.shape[:3], tokens[1] - tokens[0], head_dim)
    payload = cache.new_empty(shape) if out is None else out.view(cache.dtype).view(shape)
    for blocks, slots, part in block_spans(tokens, block_size):
        split = (blocks[1] - blocks[0], slots[1] - slots[0])
        torch.index_select(
            source[..., slots[0] : slots[1], :],
            3,
            block_table[blocks[0] : blocks[1]],
            out=payload[:, :, :, part[0] : part[1]].unflatten(3, split),
        )
    return payload if out is None else out


def block_spans(
    tokens: tuple[int, int], block_size: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """Split token positions into at most three spans: a partial first block, whole blocks, a partial last block.

    Each span is (entries of the block table, slots in each of those blocks, token indices in the payload).
    """
    start, stop = tokens
    position = start
    while position < stop:
        block, slot = divmod(position, block_size)
        num_whole = (stop - position) // block_size if slot == 0 else 0
        if num_whole:
            blocks, slots = (block, block + num_whole), (0, block_size)
        else:
            blocks, slots = (block, block + 1), (slot, min(block_size, slot + stop - position))
        length = (blocks[1] - blocks[0]) * (slots[1] - slots[0])
        yield blocks, slots, (position - start, position - start + length)
        position += length
