"""The paged KV cache of one rank: one tensor that attention reads and writes and that transfers cut slices from.

Built once by the engine. Which block belongs to whom is the block pool's business, not this one's.
"""

import torch
from torch import Tensor

from engine.tensor_parallel import TensorParallel
from protocol.errors import ConfigError
from protocol.model_config import ModelConfig


def bytes_per_block(config: ModelConfig, tensor_parallel: TensorParallel, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block on this rank: keys and values of block_size tokens in every layer."""
    num_heads = len(tensor_parallel.kv_heads(config.num_kv_heads))
    return config.num_layers * 2 * num_heads * block_size * config.head_dim * dtype.itemsize


class KVCache:
    """blocks: [num_layers, 2 (keys, values), num_blocks, num_local_kv_heads, block_size, head_dim]."""

    def __init__(
        self,
        config: ModelConfig,
        tensor_parallel: TensorParallel,
        block_size: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take as many blocks as fit in max_bytes. Raise ConfigError when that is none."""
        block_bytes = bytes_per_block(config, tensor_parallel, block_size, dtype)
        if max_bytes < block_bytes:
            raise ConfigError(f"{max_bytes} bytes hold no KV block; one block takes {block_bytes} bytes on each rank")
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.num_blocks = max_bytes // block_bytes
        num_heads = len(tensor_parallel.kv_heads(config.num_kv_heads))
        shape = (config.num_layers, 2, self.num_blocks, num_heads, block_size, config.head_dim)
        self.blocks = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each [num_blocks, num_local_kv_heads, block_size, head_dim]."""
        return self.blocks[index, 0], self.blocks[index, 1]
