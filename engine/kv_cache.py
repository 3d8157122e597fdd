"""The paged KV cache of one rank: tensors that attention reads and writes and that transfers cut slices from.

Built once by the engine. Which block belongs to whom is the block pool's business, not this one's.
"""

import torch
from torch import Tensor

from protocol.layout import KVLayout


class KVCache:
    """planes: one tensor for each of the layout's, [num_layers, num_blocks + 1, num_local_heads, block_size, dim].

    The last block is the scratch block: no sequence ever owns it, so a step may write there what nobody reads.
    """

    def __init__(self, layout: KVLayout, rank: int, num_blocks: int, device: torch.device) -> None:
        self.block_size = layout.block_size
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks
        self.planes = tuple(
            torch.zeros(shape, dtype=getattr(torch, plane.dtype), device=device)
            for plane, shape in zip(layout.planes, layout.rank_shapes(rank, num_blocks + 1), strict=True)
        )

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """Return the planes of one layer, each [num_blocks, num_local_heads, block_size, dim]."""
        return tuple(plane[index] for plane in self.planes)
