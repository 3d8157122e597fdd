"""Attention of one new token per sequence over that sequence's paged KV. Called by the decoder once per layer.

Blocks are gathered into one dense tensor as long as the longest context: simple and exact, but it copies what a fused
kernel would read in place.
"""

import torch
from torch import Tensor
from torch.nn import functional


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale * q k^T) v per sequence and head: [num_sequences, num_heads, head_dim].

    q: [num_sequences, num_heads, head_dim]; head h reads KV head h * num_kv_heads // num_heads
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    block_tables: int32 [num_sequences, max_blocks]; entries past a context may name any block of the cache
    context_lens: int32 [num_sequences], at least 1, the new token included
    """
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    positions = torch.arange(block_tables.shape[1] * block_size, device=q.device)
    is_seen = positions < context_lens.unsqueeze(1)  # [num_sequences, max_blocks * block_size]
    out = functional.scaled_dot_product_attention(
        q.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim),
        _gather(k_cache, block_tables, is_seen),
        _gather(v_cache, block_tables, is_seen),
        attn_mask=is_seen[:, None, None, :],
        scale=scale,
    )
    return out.reshape(num_sequences, num_heads, head_dim)


def _gather(cache: Tensor, block_tables: Tensor, is_seen: Tensor) -> Tensor:
    """Return the blocks as [num_sequences, num_kv_heads, max_blocks * block_size, head_dim], zero past each context.

    Zero, because what an earlier owner left there may not be finite, and a weight of 0 times NaN is NaN.
    """
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    heads = torch.arange(num_kv_heads, device=cache.device)
    rows = block_tables.long().unsqueeze(1) * num_kv_heads + heads[:, None]  # [num_sequences, num_kv_heads, max_blocks]
    dense = cache.view(-1, block_size * head_dim).index_select(0, rows.flatten())
    dense = dense.view(block_tables.shape[0], num_kv_heads, -1, head_dim)
    sequences, unseen = (~is_seen).nonzero(as_tuple=True)
    dense[sequences, :, unseen] = 0
    return dense
