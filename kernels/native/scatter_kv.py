"""One contiguous payload -> blocks of a paged KV cache; the inverse of gather_kv.

Called by kv_transfer on the receiving side, on the thread that owns the cache, after a payload has been checked.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.native.gather_kv import copy_area
from kernels.plain import scatter_kv as plain
from kernels.plain.gather_kv import Range


def scatter_kv(
    payload: Tensor,
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
) -> None:
    """Copy a payload into the cache; nothing else is written. As kernels/plain/scatter_kv.py."""
    if not copy_area("scatter_kv", payload.contiguous(), planes, block_table, layers, heads, tokens):
        plain.scatter_kv(payload, planes, block_table, layers, heads, tokens)
