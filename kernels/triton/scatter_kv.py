"""One contiguous payload -> blocks of a paged KV cache, all planes in one launch; the inverse of gather_kv.

Called by kv_transfer on the receiving side, on the thread that owns the cache, after a payload has been checked.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.plain.gather_kv import Range
from kernels.triton.gather_kv import launch_copy, number, slot_offsets


def scatter_kv(
    payload: Tensor,
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
) -> None:
    """Copy a payload into the cache; nothing else is written. As kernels/plain/scatter_kv.py."""
    launch_copy(_scatter_kv, payload.contiguous(), planes, block_table, layers, heads, tokens)


@triton.jit(
    do_not_specialize=["first_layer", "num_layers", "first_token", "num_tokens", "num_blocks"],
    do_not_specialize_on_alignment=["block_table"],
)
def _scatter_kv(
    payload,  # int32, plane after plane: [num_layers, num_heads of the plane, num_tokens, SLOT_WORDS]
    planes,  # int32, each [all layers, num_blocks, NUM_CACHE_HEADS, BLOCK_SIZE, SLOT_WORDS]
    block_table,  # int64 [num_blocks of the prompt]
    first_heads,  # of each plane: see number()
    num_heads,  # likewise
    first_layer,
    num_layers,
    first_token,
    num_tokens,
    num_blocks,
    NUM_CACHE_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0)
    for index in tl.static_range(len(planes)):
        plane_heads = number(num_heads[index])
        num_rows = num_layers * plane_heads
        if (row >= 0) & (row < num_rows):
            in_payload, in_cache, mask = slot_offsets(
                row,
                block_table,
                number(first_heads[index]),
                plane_heads,
                first_layer,
                first_token,
                num_tokens,
                num_blocks,
                NUM_CACHE_HEADS[index],
                BLOCK_SIZE,
                SLOT_WORDS[index],
                TILES[index],
                TOKENS,
            )
            tl.store(planes[index] + in_cache, tl.load(payload + in_payload, mask=mask), mask=mask)
        row -= num_rows
        payload += num_rows.to(tl.int64) * num_tokens * SLOT_WORDS[index]
