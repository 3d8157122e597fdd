"""Attention of one new token per sequence over that sequence's paged KV, split along the context at every batch size.

Called by the decoder once per layer. Two passes: many programs attend to a part of a context each, then the parts are
merged by their softmax sums (Dao et al., "Flash-Decoding", 2023). Lengths stay on the GPU, which divides each context
into splits itself, so that one captured launch serves contexts of every length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import (
    ATTENTION_DECODE,
    PROGRAMS_PER_MULTIPROCESSOR,
    SPLIT_MERGE,
    choose_splits,
    num_multiprocessors,
    padded,
)
from kernels.triton.paged_attention import LOG2_E, attend, locate_rows, packed_heads


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale * q k^T) v per sequence and head: [num_sequences, num_heads, head_dim].

    As kernels/plain/attention_decode.py; also, a context of 0 tokens, which fills up a batch, gives zeros.
    """
    num_sequences, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    heads, parts = packed_heads(num_heads, num_kv_heads)
    config = ATTENTION_DECODE[q.element_size(), padded(head_dim)]
    num_splits, least_len = choose_splits(
        num_sequences * num_kv_heads * parts,
        block_tables.shape[1] * block_size,
        config.tile,
        PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(q.device),
    )
    out = q.new_empty(q.shape)
    partial_out = q.new_empty((num_sequences, num_heads, num_splits, head_dim), dtype=torch.float32)
    partial_lse = q.new_empty((num_sequences, num_heads, num_splits), dtype=torch.float32)
    # Splits vary slowest: those that a short context leaves empty are started last and end at once.
    _attend_split[num_sequences, num_kv_heads * parts, num_splits](
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        out,
        partial_out,
        partial_lse,
        scale * LOG2_E,
        q.stride(0),
        block_tables.stride(0),
        num_splits,
        least_len,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        HEADS=heads,
        PARTS=parts,
        ROWS=config.rows,
        DIMS=padded(head_dim),
        TILE=config.tile,
        **config.launch,
    )
    if num_splits > 1:
        _merge(partial_out, partial_lse, context_lens, out, num_splits, least_len, config.tile)
    return out


def _merge(
    partial_out: Tensor,
    partial_lse: Tensor,
    context_lens: Tensor,
    out: Tensor,
    num_splits: int,
    least_len: int,
    tile: int,
) -> None:
    num_sequences, num_heads, head_dim = out.shape
    _merge_splits[num_sequences, num_heads](
        partial_out,
        partial_lse,
        context_lens,
        out,
        num_splits,
        least_len,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIMS=padded(head_dim),
        TILE=tile,
        SPLITS=SPLIT_MERGE.tile,
        **SPLIT_MERGE.launch,
    )


@triton.jit
def _split_len(context_len, num_splits, least_len, TILE: tl.constexpr):
    """Return the positions of one split of a context: whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(context_len, num_splits), TILE) * TILE, least_len)


@triton.jit(
    do_not_specialize=["tables_stride", "num_splits", "least_len"],
    do_not_specialize_on_alignment=["block_tables", "context_lens"],
)
def _attend_split(
    q,  # [num_sequences, NUM_HEADS, HEAD_DIM], rows q_stride apart
    k_cache,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache,  # likewise
    block_tables,  # int32 [num_sequences, max_blocks], rows tables_stride apart
    context_lens,  # int32 [num_sequences]
    out,  # [num_sequences, NUM_HEADS, HEAD_DIM], written if there is one split
    partial_out,  # float32 [num_sequences, NUM_HEADS, num_splits, HEAD_DIM], written if there are several
    partial_lse,  # float32 [num_sequences, NUM_HEADS, num_splits], log2 of the sum of exponentials
    scale,
    q_stride,
    tables_stride,
    num_splits,
    least_len,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    context_len = tl.load(context_lens + sequence)
    split_len = _split_len(context_len, num_splits, least_len, TILE)
    start = split * split_len
    if (start >= context_len) & (split > 0):  # merging does not look at empty splits
        return
    stop = tl.minimum(start + split_len, context_len)
    kv_head, token, head, is_row = locate_rows(NUM_HEADS, NUM_KV_HEADS, HEADS, PARTS, ROWS)
    is_row &= token == 0
    dims = tl.arange(0, DIMS)
    is_element = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = head[:, None] * HEAD_DIM + dims[None, :]  # [ROWS, DIMS], within one token
    queries = tl.load(q + sequence * q_stride + offsets, mask=is_element, other=0.0)
    k_head, v_head = k_cache + kv_head * BLOCK_SIZE * HEAD_DIM, v_cache + kv_head * BLOCK_SIZE * HEAD_DIM
    table = block_tables + sequence * tables_stride
    seen = tl.zeros([ROWS], tl.int32) + stop
    acc, row_sum, row_max = attend(
        queries, k_head, v_head, table, start, None, stop, seen, scale, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, TILE
    )
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # that of an empty context, which shall give zeros
    acc = acc / row_sum[:, None]
    if num_splits == 1:
        tl.store(out + sequence * NUM_HEADS * HEAD_DIM + offsets, acc.to(out.dtype.element_ty), mask=is_element)
    else:
        index = (sequence * NUM_HEADS + head) * num_splits + split  # [ROWS]
        tl.store(partial_out + index[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_element)
        tl.store(partial_lse + index, row_max + tl.log2(row_sum), mask=is_row)


@triton.jit(do_not_specialize=["num_splits", "least_len"], do_not_specialize_on_alignment=["context_lens"])
def _merge_splits(
    partial_out,  # float32 [num_sequences, NUM_HEADS, num_splits, HEAD_DIM]
    partial_lse,  # float32 [num_sequences, NUM_HEADS, num_splits]
    context_lens,  # int32 [num_sequences]
    out,  # [num_sequences, NUM_HEADS, HEAD_DIM]
    num_splits,
    least_len,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,  # taken at a time
):
    """Write the mean of a head's splits, weighted by what each one's exponentials add up to."""
    sequence = tl.program_id(0)
    row = sequence.to(tl.int64) * NUM_HEADS + tl.program_id(1)
    context_len = tl.load(context_lens + sequence)
    num_used = tl.cdiv(context_len, _split_len(context_len, num_splits, least_len, TILE))
    dims = tl.arange(0, DIMS)
    acc = tl.zeros([DIMS], tl.float32)
    total = 0.0
    most = float("-inf")
    for first in range(0, num_used, SPLITS):
        split = first + tl.arange(0, SPLITS)
        index = row * num_splits + split
        lse = tl.load(partial_lse + index, mask=split < num_used, other=float("-inf"))
        is_element = (split < num_used)[:, None] & (dims < HEAD_DIM)[None, :]
        part = tl.load(partial_out + index[:, None] * HEAD_DIM + dims[None, :], mask=is_element, other=0.0)
        new_most = tl.maximum(most, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_most)
        shrink = tl.exp2(most - new_most)
        acc = acc * shrink + tl.sum(part * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        most = new_most
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD_DIM + dims, acc.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
