"""One contiguous payload -> blocks of a paged KV cache; the inverse of gather_kv.

Called by kv_transfer on the receiving side, on the thread that owns the cache, after a payload has been checked.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.gather_kv import launch_copy, slot_offsets


def scatter_kv(
    payload: Tensor,
    cache: Tensor,
    block_table: Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
    tokens: tuple[int, int],
) -> None:
    """Copy a payload into the cache; nothing else is written. As kernels/plain/scatter_kv.py."""
    launch_copy(_scatter_kv, payload.contiguous(), cache, block_table, layers, heads, tokens)


@triton.jit(
    do_not_specialize=["first_layer", "first_head", "num_heads", "first_token", "num_tokens", "num_blocks"],
    do_not_specialize_on_alignment=["block_table"],
)
def _scatter_kv(
    payload,  # [num_layers, 2, num_heads, num_tokens, HEAD_DIM]
    cache,  # [all layers, 2, num_blocks, NUM_CACHE_HEADS, BLOCK_SIZE, HEAD_DIM]
    block_table,  # int64 [num_blocks of the prompt]
    first_layer,
    first_head,
    num_heads,
    first_token,
    num_tokens,
    num_blocks,
    NUM_CACHE_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    DIMS: tl.constexpr,
):
    in_payload, in_cache, mask = slot_offsets(
        block_table,
        first_layer,
        first_head,
        num_heads,
        first_token,
        num_tokens,
        num_blocks,
        NUM_CACHE_HEADS,
        BLOCK_SIZE,
        HEAD_DIM,
        TOKENS,
        DIMS,
    )
    tl.store(cache + in_cache, tl.load(payload + in_payload, mask=mask), mask=mask)
