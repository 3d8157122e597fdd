"""gather_kv in plain torch: blocks of a paged KV cache -> one contiguous payload.

Called by kv_transfer on the sending side. Knows local heads only; which heads those are is the plan's business.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Range = tuple[int, int]


def gather_kv(
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
    out: Tensor | None = None,
) -> Tensor:
    """Copy a range of layers and token positions, and a range of local heads of each plane, out of the cache.

    planes: each [num_layers, num_blocks, num_local_heads, block_size, dim], of any dims and types. block_table: int64
    on the cache's device, [num_blocks of the prompt], from position 0. Ranges are half-open; one of heads may be empty.
    Returns the payload, uint8, on the cache's device: plane after plane, each [num_layers, num_heads, num_tokens, dim].
    That is out when it is given: as many bytes or elements, contiguous, in any shape.
    """
    payload = new_payload(planes, layers, heads, tokens) if out is None else out
    for part, plane, (first, stop) in zip(parts_of(payload, planes, layers, heads, tokens), planes, heads, strict=True):
        wanted = plane.view(torch.uint8)[layers[0] : layers[1], :, first:stop]
        source = wanted.transpose(1, 2)  # [layers, heads, blocks, block_size, slot_bytes]
        for blocks, slots, place in block_spans(tokens, plane.shape[3]):
            split = (blocks[1] - blocks[0], slots[1] - slots[0])
            torch.index_select(
                source[..., slots[0] : slots[1], :],
                2,
                block_table[blocks[0] : blocks[1]],
                out=part[:, :, place[0] : place[1]].unflatten(2, split),
            )
    return payload


def new_payload(planes: Sequence[Tensor], layers: Range, heads: Sequence[Range], tokens: Range) -> Tensor:
    """Return memory for what is gathered: uint8, on the cache's device."""
    slot_bytes = sum(
        (stop - first) * plane.shape[-1] * plane.itemsize for plane, (first, stop) in zip(planes, heads, strict=True)
    )
    num_bytes = (layers[1] - layers[0]) * (tokens[1] - tokens[0]) * slot_bytes
    return planes[0].new_empty(num_bytes, dtype=torch.uint8)


def parts_of(
    payload: Tensor, planes: Sequence[Tensor], layers: Range, heads: Sequence[Range], tokens: Range
) -> Iterator[Tensor]:
    """Yield what a payload holds of each plane, as a view, uint8 [num_layers, num_heads, num_tokens, slot_bytes].

    Of bytes, since what comes before may be of another type, and as long as it likes.
    """
    data = payload.flatten().view(torch.uint8)
    start = 0
    for plane, (first, stop) in zip(planes, heads, strict=True):
        shape = (layers[1] - layers[0], stop - first, tokens[1] - tokens[0], plane.shape[-1] * plane.itemsize)
        end = start + math.prod(shape)
        yield data[start:end].view(shape)
        start = end


def block_spans(tokens: Range, block_size: int) -> Iterator[tuple[Range, Range, Range]]:
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
