"""Causal attention of several new tokens per sequence over that sequence's paged KV, its cached prefix included.

Called by the decoder once per layer. Chunks of every length are cut into tiles of tokens, and the tiles with the most
to see start first (Graham's longest-processing-time rule, 1969), so that no heavy tile begins when the others end. The
host knows only an upper bound of the number of tiles; a small kernel finds and orders them on the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import ATTENTION_PLAN, ATTENTION_PREFILL, chip, padded
from kernels.triton.paged_attention import LOG2_E, attend, locate_rows, packed_heads


def attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Return softmax(scale * q k^T) v per token and head, each token seeing itself and all before it.

    As kernels/plain/attention_prefill.py; also, a chunk may be empty.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    heads, parts = packed_heads(num_heads, num_kv_heads)
    config = ATTENTION_PREFILL[chip(q.device), q.element_size(), padded(head_dim)]
    tokens = config.rows // heads
    tiles = _plan_tiles(query_starts, context_lens, num_tokens, tokens)
    out = q.new_empty(q.shape)
    # Tiles vary fastest: programs that run at the same time read the same KV head, which then stays in the L2 cache.
    _attend_tile[tiles.shape[0], num_kv_heads * parts](
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        tiles,
        out,
        scale * LOG2_E,
        q.stride(0),
        block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        HEADS=heads,
        PARTS=parts,
        TOKENS=tokens,
        ROWS=config.rows,
        DIMS=padded(head_dim),
        TILE=config.tile,
        **config.launch,
    )
    return out


def _plan_tiles(query_starts: Tensor, context_lens: Tensor, num_tokens: int, tokens: int) -> Tensor:
    """Return int32 [bound of the number of tiles, 2]: sequence and first token in its chunk; -1 where there is none."""
    num_sequences = context_lens.shape[0]
    bound = num_tokens // tokens + num_sequences  # each sequence ends with at most one tile that is not full
    tiles = torch.full((bound, 2), -1, dtype=torch.int32, device=context_lens.device)
    _order_tiles[(num_sequences,)](
        query_starts,
        context_lens,
        tiles,
        num_sequences,
        TOKENS=tokens,
        TILES=ATTENTION_PLAN.rows,
        OTHERS=ATTENTION_PLAN.tile,
        **ATTENTION_PLAN.launch,
    )
    return tiles


@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["query_starts", "context_lens"])
def _order_tiles(
    query_starts,  # int32 [num_sequences + 1]
    context_lens,  # int32 [num_sequences]
    tiles,  # int32 [bound, 2]
    num_sequences,
    TOKENS: tl.constexpr,  # per tile
    TILES: tl.constexpr,  # placed at once
    OTHERS: tl.constexpr,  # sequences compared with at once
):
    """Write each tile of one sequence to its place by the number of positions that its last token sees, most first.

    A tile's place is the number of tiles that go before it. There is no need to sort: in every sequence tiles see
    TOKENS more than the one before, so how many of them see more than this one follows from a division.
    """
    sequence = tl.program_id(0)
    query_len = tl.load(query_starts + sequence + 1) - tl.load(query_starts + sequence)
    prefix_len = tl.load(context_lens + sequence) - query_len
    for first in range(0, tl.cdiv(query_len, TOKENS), TILES):
        tile = first + tl.arange(0, TILES)
        num_seen = prefix_len + tl.minimum((tile + 1) * TOKENS, query_len)  # [TILES]
        place = tl.zeros([TILES], tl.int32)
        for first_other in range(0, num_sequences, OTHERS):
            other = first_other + tl.arange(0, OTHERS)
            is_other = other < num_sequences
            start = tl.load(query_starts + other, mask=is_other, other=0)
            other_len = tl.load(query_starts + other + 1, mask=is_other, other=0) - start  # [OTHERS]
            other_prefix = tl.load(context_lens + other, mask=is_other, other=0) - other_len
            # Of tiles that see the same, those of earlier sequences go first.
            threshold = num_seen[:, None] - (other < sequence)[None, :].to(tl.int32)  # [TILES, OTHERS]
            num_tiles = tl.cdiv(other_len, TOKENS)[None, :]
            not_above = tl.maximum(threshold - other_prefix[None, :], 0) // TOKENS
            above = num_tiles - tl.minimum(not_above, num_tiles - 1)  # a last tile sees less than TOKENS more
            is_any_above = (other_len > 0)[None, :] & (threshold < (other_prefix + other_len)[None, :])
            place += tl.sum(tl.where(is_any_above, above, 0), axis=1)
        is_tile = tile * TOKENS < query_len
        tl.store(tiles + place * 2, tl.zeros([TILES], tl.int32) + sequence, mask=is_tile)
        tl.store(tiles + place * 2 + 1, tile * TOKENS, mask=is_tile)


@triton.jit(
    do_not_specialize=["tables_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lens"],
)
def _attend_tile(
    q,  # [num_tokens, NUM_HEADS, HEAD_DIM], rows q_stride apart
    k_cache,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache,  # likewise
    block_tables,  # int32 [num_sequences, max_blocks], rows tables_stride apart
    query_starts,  # int32 [num_sequences + 1]
    context_lens,  # int32 [num_sequences]
    tiles,  # int32 [bound, 2], sequence and first token in its chunk
    out,  # [num_tokens, NUM_HEADS, HEAD_DIM]
    scale,
    q_stride,
    tables_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,  # of this program: ROWS // HEADS
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = tl.load(tiles + tl.program_id(0) * 2)
    if sequence < 0:
        return
    first_token = tl.load(tiles + tl.program_id(0) * 2 + 1)
    query_start = tl.load(query_starts + sequence)
    query_len = tl.load(query_starts + sequence + 1) - query_start
    prefix_len = tl.load(context_lens + sequence) - query_len
    kv_head, token, head, is_row = locate_rows(NUM_HEADS, NUM_KV_HEADS, HEADS, PARTS, ROWS)
    is_row &= (token < TOKENS) & (first_token + token < query_len)
    token += first_token  # [ROWS], in the chunk
    dims = tl.arange(0, DIMS)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = head[:, None] * HEAD_DIM + dims[None, :]  # [ROWS, DIMS], within one token
    row_in_q = (query_start + token).to(tl.int64)[:, None]
    queries = tl.load(q + row_in_q * q_stride + offsets, mask=is_element, other=0.0)
    k_head, v_head = k_cache + kv_head * BLOCK_SIZE * HEAD_DIM, v_cache + kv_head * BLOCK_SIZE * HEAD_DIM
    table = block_tables + sequence.to(tl.int64) * tables_stride
    seen = prefix_len + token + 1  # [ROWS]
    diagonal = (prefix_len + first_token + 1) // TILE * TILE  # only tiles from here on pay for masks
    stop = prefix_len + tl.minimum(first_token + TOKENS, query_len)
    acc, row_sum, _ = attend(
        queries, k_head, v_head, table, 0, diagonal, stop, seen, scale, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, TILE
    )
    acc = acc / row_sum[:, None]
    tl.store(out + row_in_q * NUM_HEADS * HEAD_DIM + offsets, acc.to(out.dtype.element_ty), mask=is_element)
