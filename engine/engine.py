"""The engine of one rank: weights, KV cache and forward pass behind one call. Built by a worker, driven by its steps.

Both roles stand on it and neither is known here; so are requests. Sampling is the sampler's work, on rank 0 only.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.batch_tensors import to_tensors
from engine.host_copy import upload
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
        self.device = device
        self.vocab_size = config.vocab_size
        self._tensor_parallel = tensor_parallel
        self.kv_cache = KVCache(config, tensor_parallel, block_size, kv_bytes, dtype, device)
        weights = load_weights(folder, config, dtype, device, tensor_parallel, progress)
        self._model = Decoder(config, weights, tensor_parallel, operations_for(device))

    @property
    def is_asynchronous(self) -> bool:
        """Whether forward returns before the device has computed, so that the host should be a step ahead."""
        return self.device.type != "cpu"

    @torch.inference_mode()
    def forward(self, batch: Batch, drawn: Tensor | None = None) -> Tensor | None:
        """Run one batch, all ranks at once; its KV is in the cache afterwards.

        drawn: int64, what the batch before draws, where this one carries tokens; on rank 0 only, the others hear of it.
        Return float32 logits [len(batch.sampled), vocab_size] on rank 0, None on the others.
        """
        tensors = to_tensors(batch, self.kv_cache.block_size, self.device)
        if batch.carried:
            self._carry(batch, tensors.token_ids, drawn)
        return self._model.forward(tensors, self.kv_cache)

    def _carry(self, batch: Batch, token_ids: Tensor, drawn: Tensor | None) -> None:
        """Put the tokens that the batch before draws in their places."""
        indices, rows = zip(*((token.index, token.row) for token in batch.carried), strict=True)
        places, rows_on_device = upload([torch.tensor(indices), torch.tensor(rows)], self.device)
        carried = torch.empty_like(places) if drawn is None else drawn[rows_on_device]
        token_ids[places] = self._tensor_parallel.broadcast(carried)
