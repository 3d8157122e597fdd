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
def locate_rows(
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of one program, of those that share a KV head
    PARTS: tl.constexpr,  # programs per KV head
    ROWS: tl.constexpr,
):
    """Return this program's KV head and, per row, its token, its head and whether it is any head's: [ROWS] each."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row = tl.arange(0, ROWS)
    kv_head = tl.program_id(1) // PARTS
    head_in_group = tl.program_id(1) % PARTS * HEADS + row % HEADS
    return kv_head, row // HEADS, kv_head * GROUP + head_in_group, head_in_group < GROUP


@triton.jit
def attend(
    q,  # [ROWS, DIMS]
    k_head,  # the KV head's part of [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_head,  # likewise
    block_table,  # int32 [max_blocks], this sequence's
    start,  # first position to attend to
    middle,  # whole tiles before this one are seen by all rows and need no masks; None: there are none
    stop,  # end of the positions
    num_seen,  # int32 [ROWS], positions that each row sees, at least one from middle on
    scale,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return [ROWS, DIMS], [ROWS] and [ROWS]: sums of weighted values, sums of weights, and the scores that weigh 1."""
    dims = tl.arange(0, q.shape[1])
    acc = tl.zeros(q.shape, tl.float32)
    row_sum = tl.zeros([q.shape[0]], tl.float32)
    row_max = tl.full([q.shape[0]], float("-inf"), tl.float32)
    for is_masked in tl.static_range(middle is None, 2):
        begin = start if middle is None or not is_masked else middle
        for first in range(begin, stop if is_masked else middle, TILE):
            positions = first + tl.arange(0, TILE)
            # Unseen slots must not even be read: another owner may have left NaN there, and 0 times NaN is NaN.
            is_read = positions < stop if is_masked else tl.full([TILE], True, tl.int1)
            block_ids = tl.load(block_table + positions // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
            slots = block_ids * (NUM_KV_HEADS * BLOCK_SIZE) + positions % BLOCK_SIZE
            offsets = slots[:, None] * HEAD_DIM + dims[None, :]  # [TILE, DIMS]
            is_loaded = is_read[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_head + offsets, mask=is_loaded, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, TILE]
            if is_masked:
                scores = tl.where(positions[None, :] < num_seen[:, None], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(weights, axis=1)
            v = tl.load(v_head + offsets, mask=is_loaded, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            row_max = new_max
    return acc, row_sum, row_max
