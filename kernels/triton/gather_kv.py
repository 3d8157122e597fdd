"""Blocks of a paged KV cache -> one contiguous payload, heads and token positions cut out in the same pass.

Called by kv_transfer on the sending side. A slot of one head, head_dim elements, is the unit that is copied, so partial
blocks and slices of heads need no case of their own.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import KV_COPY, padded


def gather_kv(
    cache: Tensor,
    block_table: Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
    tokens: tuple[int, int],
    out: Tensor | None = None,
) -> Tensor:
    """Copy a range of layers, local heads and token positions out of the cache; as kernels/plain/gather_kv.py."""
    shape = (layers[1] - layers[0], 2, heads[1] - heads[0], tokens[1] - tokens[0], cache.shape[-1])
    payload = cache.new_empty(shape) if out is None else out
    launch_copy(_gather_kv, payload, cache, block_table, layers, heads, tokens)
    return payload


def launch_copy(
    kernel: triton.JITFunction,
    payload: Tensor,
    cache: Tensor,
    block_table: Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
    tokens: tuple[int, int],
) -> None:
    """Run kernel, which copies one way or the other, over all slots of the ranges."""
    _, _, num_blocks, num_cache_heads, block_size, head_dim = cache.shape
    assert cache.is_contiguous()
    assert payload.is_contiguous()
    config = KV_COPY[padded(head_dim)]
    num_heads, num_tokens = heads[1] - heads[0], tokens[1] - tokens[0]
    kernel[(layers[1] - layers[0]) * 2 * num_heads, triton.cdiv(num_tokens, config.rows)](
        payload.view(cache.dtype),
        cache,
        block_table,
        layers[0],
        heads[0],
        num_heads,
        tokens[0],
        num_tokens,
        num_blocks,
        NUM_CACHE_HEADS=num_cache_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        TOKENS=config.rows,
        DIMS=config.tile,
        **config.launch,
    )


@triton.jit
def slot_offsets(
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
    """Return this program's offsets in the payload and in the cache, and which of them count: [TOKENS, DIMS] each."""
    plane = tl.program_id(0)  # of the payload: (layer, keys or values, head)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dims = tl.arange(0, DIMS)
    is_token = token < num_tokens
    position = first_token + token
    block_id = tl.load(block_table + position // BLOCK_SIZE, mask=is_token, other=0)  # [TOKENS]
    block = (first_layer * 2 + plane // num_heads).to(tl.int64) * num_blocks + block_id  # of all layers' blocks
    slot = (block * NUM_CACHE_HEADS + first_head + plane % num_heads) * BLOCK_SIZE + position % BLOCK_SIZE
    in_payload = (plane.to(tl.int64) * num_tokens + token)[:, None] * HEAD_DIM + dims[None, :]
    return in_payload, slot[:, None] * HEAD_DIM + dims[None, :], is_token[:, None] & (dims < HEAD_DIM)[None, :]


@triton.jit(
    do_not_specialize=["first_layer", "first_head", "num_heads", "first_token", "num_tokens", "num_blocks"],
    do_not_specialize_on_alignment=["block_table"],
)
def _gather_kv(
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
    tl.store(payload + in_payload, tl.load(cache + in_cache, mask=mask), mask=mask)
