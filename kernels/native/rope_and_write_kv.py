"""Rotary position embedding (Su et al., 2021) of queries and keys, and the write of keys and values to their slots.

One pass, because the rotated keys are needed nowhere but in the cache. Called by the decoder once per layer.
"""

from torch import Tensor

from kernels.native.library import function
from kernels.plain import rope_and_write_kv as plain


def rope_and_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Return q rotated; write k rotated, and v, to the cache. Shapes as in kernels/plain/rope_and_write_kv.py."""
    run = function("rope_and_write_kv", "p" * 9 + "i" * 8, q.dtype)
    if run is None:
        return plain.rope_and_write_kv(q, k, v, cos, sin, slots, k_cache, v_cache)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    assert all(x.stride()[1:] == (head_dim, 1) for x in (q, k, v))
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    out = q.new_empty(q.shape)
    pointers = (tensor.data_ptr() for tensor in (q, k, v, cos, sin, slots, out, k_cache, v_cache))
    strides = q.stride(0), k.stride(0), v.stride(0)
    run(*pointers, num_tokens, num_heads, num_kv_heads, block_size, head_dim, *strides)
    return out
