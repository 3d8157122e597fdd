"""Attention of one new token per sequence over that sequence's paged KV, read in place. Called once per layer."""

import torch
from torch import Tensor

from kernels.native.library import function
from kernels.plain import attention_decode as plain

LANES, HEADS, POSITIONS = 16, 4, 4  # as in the C files


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Return softmax(scale * q k^T) v per sequence and head: [num_sequences, num_heads, head_dim].

    As kernels/plain/attention_decode.py. What lies in a block past its sequence's context is not read.
    """
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    run = function("attention_decode", "p" * 7 + "i" * 8 + "f", q.dtype)
    if run is None or head_dim % LANES or block_size % POSITIONS:
        return plain.attention_decode(q, k_cache, v_cache, block_tables, context_lens, scale)
    assert q.stride()[1:] == (head_dim, 1)
    assert block_tables.stride(1) == 1
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    max_context = block_tables.shape[1] * block_size
    num_tasks = num_sequences * num_kv_heads * -(-num_heads // num_kv_heads // HEADS)
    out = q.new_empty(q.shape)
    room = q.new_empty((num_tasks, HEADS * (max_context + 2 * head_dim)), dtype=torch.float32)
    tensors = q, k_cache, v_cache, block_tables, context_lens.contiguous(), out, room
    sizes = num_sequences, num_heads, num_kv_heads, block_size, head_dim
    strides = q.stride(0), block_tables.stride(0)
    run(*(tensor.data_ptr() for tensor in tensors), *sizes, *strides, max_context, scale)
    return out
