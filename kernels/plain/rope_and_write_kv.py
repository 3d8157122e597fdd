"""Rotary position embedding (Su et al., 2021) of queries and keys, and the write of keys and values to their slots.

One operation, because the rotated keys are needed nowhere but in the cache. Called by the decoder once per layer.
"""

import torch
from torch import Tensor


def rope_and_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Return q rotated; write k rotated, and v, to the cache.

    q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]
    cos, sin: float32 [num_tokens, head_dim / 2], of position times frequency; dimension i turns with i + head_dim / 2
    slots: int64 [num_tokens], block id times block size plus place in the block
    k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]
    """
    block_size = k_cache.shape[2]
    block_ids = slots.div(block_size, rounding_mode="floor")
    offsets = slots.remainder(block_size)
    k_cache[block_ids, :, offsets] = _rotate(k, cos, sin)
    v_cache[block_ids, :, offsets] = v
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)  # [num_tokens, num_heads, head_dim / 2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
