"""Paged caches with shuffled blocks for the attention tests, and attention in float64 written out head by head."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Paged:
    """Dense keys and values per sequence ([context_len, num_kv_heads, head_dim]) and the cache that holds the same."""

    keys: list[Tensor]
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor


def make_paged(context_lens: list[int], num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> Paged:
    """Everything that no context reaches is NaN, and so is block 0, which fills up the block tables."""
    needed = [-(-length // block_size) for length in context_lens]
    shape = (sum(needed) + 3, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = torch.full(shape, math.nan, dtype=dtype), torch.full(shape, math.nan, dtype=dtype)
    free = (torch.randperm(shape[0] - 1) + 1).tolist()
    block_tables = torch.zeros(len(context_lens), max(needed), dtype=torch.int32)
    keys, values = [], []
    for index, length in enumerate(context_lens):
        k, v = torch.randn(2, length, num_kv_heads, head_dim).to(dtype)
        for position in range(length):
            if position % block_size == 0:
                block_tables[index, position // block_size] = free.pop()
            block = block_tables[index, position // block_size]
            k_cache[block, :, position % block_size] = k[position]
            v_cache[block, :, position % block_size] = v[position]
        keys.append(k)
        values.append(v)
    return Paged(keys, values, k_cache, v_cache, block_tables, torch.tensor(context_lens, dtype=torch.int32))


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the last len(q) tokens of one context; q: [num_tokens, num_heads, head_dim]; float64."""
    num_tokens, num_heads, _ = q.shape
    context_len, num_kv_heads, _ = k.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for token in range(num_tokens):
        seen = context_len - num_tokens + token + 1
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = k[:seen, kv_head].double() @ q[token, head].double() * scale
            out[token, head] = scores.softmax(dim=0) @ v[:seen, kv_head].double()
    return out
