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
    """Copy a range of layers, local heads and token positions out of the cache; as kernels/plain/gather_kv.py.

    No view is made of out: of small payloads that would cost as much as the copy.
    """
    shape = (layers[1] - layers[0], 2, heads[1] - heads[0], tokens[1] - tokens[0], cache.shape[-1])
    payload = cache.new_empty(shape) if out is None else out
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
    """Call the C function of that name, which copies one way or the other; return whether there is one.

    payload: of the cache's type or as bytes, in any shape.
    """
    run = function(name, "ppp" + "i" * 9)
    if run is None:
        return False
    num_layers, _, num_blocks, num_cache_heads, block_size, head_dim = cache.shape
    num_planes, num_heads, num_tokens = 2 * (layers[1] - layers[0]), heads[1] - heads[0], tokens[1] - tokens[0]
    slot_bytes = head_dim * cache.itemsize
    assert cache.is_contiguous()
    assert payload.is_contiguous()
    assert block_table.is_contiguous()
    assert payload.dtype in (cache.dtype, torch.uint8)
    assert block_table.dtype == torch.int64
    assert payload.nbytes == num_planes * num_heads * num_tokens * slot_bytes
    # C does not look whether an area is there; block ids are checked where a table comes in
    assert 0 <= layers[0] <= layers[1] <= num_layers
    assert 0 <= heads[0] <= heads[1] <= num_cache_heads
    assert 0 <= tokens[0] <= tokens[1] <= len(block_table) * block_size
    first_plane = cache.data_ptr() + 2 * layers[0] * num_blocks * num_cache_heads * block_size * slot_bytes
    pointers = first_plane, payload.data_ptr(), block_table.data_ptr()
    sizes = num_planes, num_blocks, num_cache_heads, block_size, slot_bytes
    run(*pointers, *sizes, heads[0], num_heads, tokens[0], num_tokens)
    return True
