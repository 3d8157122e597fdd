"""How many bytes one block of KV takes on one rank, computed without torch.

Used to refuse a cache that is too small before anything starts; the engine makes the real allocation.
"""

from protocol.model_config import ModelConfig
from protocol.topology import Dtype

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def block_bytes(model: ModelConfig, dtype: Dtype, block_size: int, tensor_parallel: int) -> int:
    """Return the bytes of one block: keys and values of block_size tokens, all layers, this rank's heads."""
    heads_per_rank = max(1, model.num_kv_heads // tensor_parallel)
    scalar_bytes = _BYTES.get(model.dtype if dtype == "auto" else dtype, 4)
    return 2 * model.num_layers * block_size * heads_per_rank * model.head_dim * scalar_bytes
