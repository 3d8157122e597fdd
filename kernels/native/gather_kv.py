"""Blocks of a paged KV cache -> one contiguous payload, each run of bytes copied once, whatever its element type.

Called by kv_transfer on the sending side, and by engine to park sequences.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.native.library import function
from kernels.plain import gather_kv as plain
from kernels.plain.gather_kv import Range


def gather_kv(
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
    out: Tensor | None = None,
) -> Tensor:
    """Copy ranges of layers, local heads and token positions out of the cache; as kernels/plain/gather_kv.py.

    No view is made of out: of small payloads that would cost as much as the copy.
    """
    payload = plain.new_payload(planes, layers, heads, tokens) if out is None else out
    if not copy_area("gather_kv", payload, planes, block_table, layers, heads, tokens):
        plain.gather_kv(planes, block_table, layers, heads, tokens, payload)
    return payload


def copy_area(
    name: str,
    payload: Tensor,
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
) -> bool:
    """Call the C function of that name, which copies one way or the other; return whether there is one.

    payload: as elements or as bytes, in any shape. C is given a struct plane (paged_copy.h) for each plane.
    """
    run = function(name, "pp" + "i" * 6)
    if run is None:
        return False
    num_layers, num_blocks, _, block_size, _ = planes[0].shape
    num_copied, num_tokens = layers[1] - layers[0], tokens[1] - tokens[0]
    assert payload.is_contiguous()
    assert block_table.is_contiguous()
    assert block_table.dtype == torch.int64
    # C does not look whether an area is there; block ids are checked where a table comes in
    assert 0 <= layers[0] <= layers[1] <= num_layers
    assert 0 <= tokens[0] <= tokens[1] <= len(block_table) * block_size
    fields: list[int] = []
    begin = start = payload.data_ptr()
    for plane, (first, stop) in zip(planes, heads, strict=True):
        *sizes, slot = plane.shape
        num_heads, slot_bytes = sizes[2], slot * plane.itemsize
        assert plane.is_contiguous()
        assert sizes == [num_layers, num_blocks, num_heads, block_size]
        assert 0 <= first <= stop <= num_heads
        first_layer = plane.data_ptr() + layers[0] * num_blocks * num_heads * block_size * slot_bytes
        fields += first_layer, start, num_heads, slot_bytes, first, stop - first
        start += num_copied * (stop - first) * num_tokens * slot_bytes
    assert start == begin + payload.nbytes
    table = struct.pack(f"{len(fields)}q", *fields)
    run(table, block_table.data_ptr(), len(planes), num_copied, num_blocks, block_size, tokens[0], num_tokens)
    return True
