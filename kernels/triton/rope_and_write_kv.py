"""Rotary position embedding (Su et al., 2021) of queries and keys, and the write of keys and values to their slots.

One pass, because the rotated keys are needed nowhere but in the cache. Called by the decoder once per layer.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import ROPE, padded


def rope_and_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Return q rotated; write k rotated, and v, to the cache.

    Shapes as in kernels/plain/rope_and_write_kv.py. Tokens may lie apart, as parts of one wider row; heads may not.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    assert all(x.stride()[1:] == (head_dim, 1) for x in (q, k, v))
    config = ROPE[padded(head_dim)]
    out = q.new_empty(q.shape)
    parts = triton.cdiv(num_heads, config.rows) + triton.cdiv(num_kv_heads, config.rows)
    _rope_and_write_kv[num_tokens, parts](
        q,
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        slots,
        out,
        k_cache,
        v_cache,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        HEADS=config.rows,
        HALF_DIMS=padded(head_dim) // 2,
        **config.launch,
    )
    return out


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rope_and_write_kv(
    q,  # [num_tokens, NUM_HEADS, HEAD_DIM], tokens q_stride apart
    k,  # [num_tokens, NUM_KV_HEADS, HEAD_DIM], tokens k_stride apart
    v,  # [num_tokens, NUM_KV_HEADS, HEAD_DIM], tokens v_stride apart
    cos,  # float32 [num_tokens, HEAD_DIM // 2]
    sin,  # likewise
    slots,  # int64 [num_tokens]
    out,  # [num_tokens, NUM_HEADS, HEAD_DIM]
    k_cache,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache,  # likewise
    q_stride,
    k_stride,
    v_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,  # per program
    HALF_DIMS: tl.constexpr,  # HEAD_DIM / 2 or more
):
    """Turn some heads of one token: query heads come first, in the last programs KV heads."""
    Q_PARTS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, HALF_DIMS)
    half = HEAD_DIM // 2
    c = tl.load(cos + token * half + dims, mask=dims < half, other=0.0)[None, :]
    s = tl.load(sin + token * half + dims, mask=dims < half, other=0.0)[None, :]
    if part < Q_PARTS:
        heads = part * HEADS + tl.arange(0, HEADS)
        mask = (heads < NUM_HEADS)[:, None] & (dims < half)[None, :]
        offsets = heads[:, None] * HEAD_DIM + dims[None, :]  # [HEADS, HALF_DIMS], within one token
        _rotate(q + token * q_stride + offsets, out + token * NUM_HEADS * HEAD_DIM + offsets, c, s, half, mask)
    else:
        heads = (part - Q_PARTS) * HEADS + tl.arange(0, HEADS)
        mask = (heads < NUM_KV_HEADS)[:, None] & (dims < half)[None, :]
        offsets = heads[:, None] * HEAD_DIM + dims[None, :]
        slot = tl.load(slots + token)
        rows = (slot // BLOCK_SIZE * NUM_KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE  # [HEADS], of the cache
        places = rows[:, None] * HEAD_DIM + dims[None, :]
        _rotate(k + token * k_stride + offsets, k_cache + places, c, s, half, mask)
        tl.store(v_cache + places, tl.load(v + token * v_stride + offsets, mask=mask), mask=mask)
        tl.store(v_cache + places + half, tl.load(v + token * v_stride + offsets + half, mask=mask), mask=mask)


@triton.jit
def _rotate(source, target, cos, sin, half, mask):
    """Turn pairs (i, i + half); source and target point to the first of each pair: [HEADS, HALF_DIMS]."""
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (first * cos - second * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(target + half, (second * cos + first * sin).to(target.dtype.element_ty), mask=mask)
