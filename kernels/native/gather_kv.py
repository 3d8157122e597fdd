"""Blocks of a paged KV cache -> one contiguous payload, each run of bytes copied once, whatever its element type.

Called by kv_transfer on the sending side, and by engine to park sequences.
"""

import torch
from torch import Tensor

from kernels.native.library import function
from kernels.plain import gather_kv as plain


def gather_kv(
    cache: Tensor,
    block_table: Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
    tokens: tuple[int, int],
    out: Tensor | None = None,
) -> Tensor:
    """Copy a range of layers, local heads and token positions out of the cache; as kernels/plain/gather_kv.py."""
    shape = (layers[1] - layers[0], 2, heads[1] - heads[0], tokens[1] - tokens[0], cache.shape[-1])
    payload = cache.new_empty(shape) if out is None else out.view(shape)
    if not copy_area("gather_kv", payload, cache, block_table, layers, heads, tokens):
        plain.gather_kv(cache, block_table, layers, heads, tokens, payload)
    return payload


def copy_area(
    name: str,
    payload: Tensor,
    cache: Tensor,
    block_table: Tensor,
    layers: tuple[int, int],
    heads: tuple[int, int],
    tokens: tuple[int, int],
) -> bool:
    """Call the C function of that name, which copies one way or the other; return whether there is one."""
    run = function(name, "ppp" + "i" * 9)
    if run is None:
        return False
    num_layers, _, num_blocks, num_cache_heads, block_size, head_dim = cache.shape
    num_heads, num_tokens = heads[1] - heads[0], tokens[1] - tokens[0]
    assert cache.is_contiguous()
    assert payload.is_contiguous()
    assert block_table.is_contiguous()
    assert (payload.dtype, block_table.dtype) == (cache.dtype, torch.int64)
    assert payload.shape == (layers[1] - layers[0], 2, num_heads, num_tokens, head_dim)
    # C does not look whether an area is there; block ids are checked where a table comes in
    assert 0 <= layers[0] <= layers[1] <= num_layers
    assert 0 <= heads[0] <= heads[1] <= num_cache_heads
    assert 0 <= tokens[0] <= tokens[1] <= len(block_table) * block_size
    pointers = cache[layers[0] : layers[1]].data_ptr(), payload.data_ptr(), block_table.data_ptr()
    sizes = 2 * (layers[1] - layers[0]), num_blocks, num_cache_heads, block_size, head_dim * cache.itemsize
    run(*pointers, *sizes, heads[0], num_heads, tokens[0], num_tokens)
    return True
