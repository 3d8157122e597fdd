"""What decode and prefill attention share: the walk of packed query rows over one sequence's paged keys and values.

A program works for the query heads of one KV head at once, so their keys and values are read once. The softmax is kept
running while tiles pass by (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; tiles as in Dao
et al., "FlashAttention", 2022), in powers of two, since the GPU has exp2 but not exp: scale holds log2(e) too.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
_MAX_PACKED_HEADS = 16


def packed_heads(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Return (query heads that one program takes, programs per KV head)."""
    group = num_heads // num_kv_heads
    heads = min(group, _MAX_PACKED_HEADS)
    return heads, -(-group // heads)


@triton.jit
def attend(
    q,  # [ROWS, DIMS]
    acc,  # float32 [ROWS, DIMS], sum of values weighted by exp2(score - row_max)
    row_max,  # float32 [ROWS]
    row_sum,  # float32 [ROWS], sum of the weights
    k_cache,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache,  # likewise
    block_table,  # int32 [max_blocks], this sequence's
    kv_head,
    start,  # first position to attend to; a multiple of TILE
    stop,  # end of the positions; all of them, up to a multiple of TILE, are seen by every row unless IS_MASKED
    num_seen,  # int32 [ROWS], positions that each row sees
    scale,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Return acc, row_max and row_sum after the positions from start to stop."""
    dims = tl.arange(0, DIMS)
    for first in range(start, stop, TILE):
        positions = first + tl.arange(0, TILE)
        # Unseen slots must not even be read: another owner may have left NaN there, and 0 times NaN is NaN.
        is_read = (positions < stop) if IS_MASKED else (positions >= 0)
        block_ids = tl.load(block_table + positions // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
        slots = (block_ids * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
        offsets = slots[:, None] * HEAD_DIM + dims[None, :]  # [TILE, DIMS]
        is_loaded = is_read[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_cache + offsets, mask=is_loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, TILE]
        if IS_MASKED:
            scores = tl.where(positions[None, :] < num_seen[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_cache + offsets, mask=is_loaded, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum
