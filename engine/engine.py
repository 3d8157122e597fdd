"""The engine of one rank: weights, KV cache and forward pass behind one call. Built by a worker, driven by its steps.

Both roles stand on it and neither is known here; so are requests. Sampling is the sampler's work, on rank 0 only.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.batch_tensors import to_tensors
from engine.kv_cache import KVCache
from engine.model import Decoder
from engine.tensor_parallel import TensorParallel
from engine.weights import load_weights
from kernels.backend import operations_for
from protocol.model_config import ModelConfig
from protocol.orders import Batch


class Engine:
    """One rank. All ranks of a group must be given the same batches in the same order."""

    def __init__(
        self,
        config: ModelConfig,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        tensor_parallel: TensorParallel,
        block_size: int,
        kv_bytes: int,
        progress: Callable[[str], None] = lambda doing: None,
    ) -> None:
        """Load the weights in folder and take kv_bytes for KV blocks. Raise ConfigError for what cannot be served."""
        config.check_tensor_parallel(tensor_parallel.size)
        self._device = device
        self.kv_cache = KVCache(config, tensor_parallel, block_size, kv_bytes, dtype, device)
        weights = load_weights(folder, config, dtype, device, tensor_parallel, progress)
        self._model = Decoder(config, weights, tensor_parallel, operations_for(device))

    def forward(self, batch: Batch) -> Tensor | None:
        """Run one batch, all ranks at once; its KV is in the cache afterwards.

        Return float32 logits [len(batch.sampled), vocab_size] on rank 0, None on the others.
        """
        return self._model.forward(to_tensors(batch, self.kv_cache.block_size, self._device), self.kv_cache)
