"""Causal attention of several new tokens per sequence over that sequence's paged KV, its cached prefix included.

Called by the decoder once per layer for the chunks of more than one token, whose own KV is already in the cache. One
dense attention per sequence; the loop is over sequences, never over tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional


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

    q: [num_tokens, num_heads, head_dim], chunk after chunk; head h reads KV head h * num_kv_heads // num_heads
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    block_tables: int32 [num_sequences, max_blocks]; entries past a context may name any block of the cache
    query_starts: int32 [num_sequences + 1]; chunk i is q[query_starts[i] : query_starts[i + 1]]
    context_lens: int32 [num_sequences]; chunk i is the last tokens of its context
    """
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for index, context_len in enumerate(context_lens.tolist()):
        chunk = slice(starts[index], starts[index + 1])
        k = _gather(k_cache, block_tables[index], context_len)
        v = _gather(v_cache, block_tables[index], context_len)
        out[chunk] = _attend(q[chunk], k, v, scale)
    return out


def _gather(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """Return the context's keys or values as [num_kv_heads, context_len, head_dim]."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    blocks = cache.index_select(0, block_table[: -(-context_len // block_size)])
    return blocks.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :context_len]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return the attention of the last len(q) tokens of one context; q: [num_tokens, num_heads, head_dim]."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, context_len, _ = k.shape
    shape = (num_kv_heads, num_heads // num_kv_heads, context_len, head_dim)
    is_whole = num_tokens == context_len
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1).view(num_kv_heads, -1, num_tokens, head_dim),
        k.unsqueeze(1).expand(shape),
        v.unsqueeze(1).expand(shape),
        attn_mask=None if is_whole else _causal_mask(num_tokens, context_len, q.device),
        is_causal=is_whole,
        scale=scale,
    )
    return out.reshape(num_heads, num_tokens, head_dim).transpose(0, 1)


def _causal_mask(num_tokens: int, context_len: int, device: torch.device) -> Tensor:
    """Return the bool mask of the last num_tokens tokens: [num_tokens, context_len], True where seen."""
    return torch.ones(num_tokens, context_len, dtype=torch.bool, device=device).tril(context_len - num_tokens)
