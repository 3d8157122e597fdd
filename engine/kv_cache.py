"""The paged KV cache of one rank: one tensor that attention reads and writes and that transfers cut slices from.

Built once by the engine. Which block belongs to whom is the block pool's business, not this one's.
"""

import torch
from torch import Tensor

from engine.tensor_parallel import TensorParallel
from protocol.model_config import ModelConfig


def bytes_per_block(config: ModelConfig, tensor_parallel: TensorParallel, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block on this rank: keys and values of block_size tokens in every layer."""
    num_heads = len(tensor_parallel.kv_heads(config.num_kv_heads))
    return config.num_layers * 2 * num_heads * block_size * config.head_dim * dtype.itemsize


class KVCache:
    """blocks: [num_layers, 2 (keys, values), num_blocks + 1, num_local_kv_heads, block_size, head_dim].

    The last one is the scratch block: no sequence ever owns it, so a step may write there what nobody reads.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor_parallel: TensorParallel,
        block_size: int,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks
        num_heads = len(tensor_parallel.kv_heads(config.num_kv_heads))
        shape = (config.num_layers, 2, num_blocks + 1, num_heads, block_size, config.head_dim)
        self.blocks = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on this rank."""
        return self.blocks[:, :, 0].nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each [num_blocks, num_local_kv_heads, block_size, head_dim]."""
        return self.blocks[index, 0], self.blocks[index, 1]
