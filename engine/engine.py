"""The engine of one rank: weights, KV cache and forward pass behind one call. Built by a worker, driven by its steps.

Both roles stand on it and neither is known here; so are requests. Sampling is the sampler's work, on rank 0 only.
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.batch_tensors import to_tensors
from engine.decode_graphs import DecodeGraphs, Scratch, cuda_capture, padded_sizes
from engine.kv_cache import KVCache
from engine.limits import DEFAULT_LIMITS, KVMemory, Limits, ShareOfFree
from engine.warm_up import warm_up
from kernels.backend import operations_for
from kernels.upload import upload
from models.decoder import Decoder, LayersDone, load_decoder
from models.formats import Tensors
from models.inputs import BatchTensors
from models.spec import DecoderSpec, ModelSpec
from models.tensor_parallel import TensorParallel
from protocol.errors import ConfigError
from protocol.layout import KVLayout
from protocol.orders import Batch
from protocol.progress import Tell, say_nothing


class Engine:
    """One rank. All ranks of a group must be given the same batches in the same order."""

    def __init__(
        self,
        model: ModelSpec,
        source: Path | Tensors,
        dtype: torch.dtype,
        device: torch.device,
        tensor_parallel: TensorParallel,
        layout: KVLayout,
        kv_memory: KVMemory,
        limits: Limits = DEFAULT_LIMITS,
        progress: Tell = say_nothing,
    ) -> None:
        """Load the weights, take memory for KV blocks, and make everything ready that limits allow.

        source: the model's folder, or its tensors. layout: of the group's KV. Raise ConfigError for what cannot be
        served.
        """
        model.facts.check_tensor_parallel(tensor_parallel.size)
        self.device = device
        self.vocab_size = model.facts.vocab_size
        self._dtype = dtype
        self._tensor_parallel = tensor_parallel
        self._layout = layout
        self._block_size = layout.block_size
        self._decoder = self._load(source, model.decoder, progress)
        self._graphs: DecodeGraphs | None = None
        self._open(kv_memory, limits, progress)

    def _load(self, source: Path | Tensors, spec: DecoderSpec, progress: Tell) -> Decoder:
        operations = operations_for(self.device)
        try:
            return load_decoder(source, spec, self._dtype, self.device, self._tensor_parallel, operations, progress)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"the device has no memory for this rank's weights ({error})") from error

    @property
    def is_asynchronous(self) -> bool:
        """Whether forward returns before the device has computed, so that the host should be a step ahead."""
        return self.device.type != "cpu"

    @torch.inference_mode()
    def forward(
        self, batch: Batch, drawn: Tensor | None = None, layers_done: LayersDone | None = None
    ) -> Tensor | None:
        """Run one batch, all ranks at once; its KV is in the cache afterwards.

        drawn: int64, what the batch before draws, where this one carries tokens; on rank 0 only, the others hear of it.
        layers_done: told how many layers' KV is in the cache by now; not told of batches that are captured.
        Return float32 logits [len(batch.sampled), vocab_size] on rank 0, None on the others; they stay as they are
        until the next batch.
        """
        tensors = to_tensors(batch, self._block_size, self.device)
        if batch.carried:
            self._carry(batch, tensors.token_ids, drawn)
        if self._graphs is not None and self._graphs.can_run(tensors):
            return self._graphs.run(tensors)
        logits = self._compute(tensors, layers_done)
        return None if logits is None else logits.to(torch.float32)

    def _compute(self, tensors: BatchTensors, layers_done: LayersDone | None = None) -> Tensor | None:
        return self._decoder.forward(tensors, self.kv_cache.layer, layers_done)

    def _carry(self, batch: Batch, token_ids: Tensor, drawn: Tensor | None) -> None:
        """Put the tokens that the batch before draws in their places."""
        indices, rows = zip(*((token.index, token.row) for token in batch.carried), strict=True)
        places, rows_on_device = upload([torch.tensor(indices), torch.tensor(rows)], self.device)
        carried = torch.empty_like(places) if drawn is None else drawn[rows_on_device]
        token_ids[places] = self._tensor_parallel.broadcast(carried)

    def _open(self, kv_memory: KVMemory, limits: Limits, progress: Tell) -> None:
        """Take the KV cache and, where kernels are compiled and launches captured, do so before the first request."""
        num_bytes = kv_memory if isinstance(kv_memory, int) else self._free_bytes(kv_memory, limits, progress)
        block_bytes = self._layout.block_bytes
        if num_bytes < block_bytes:
            raise ConfigError(f"{num_bytes} bytes hold no KV block; one block takes {block_bytes} bytes on each rank")
        self._take_cache(self._tensor_parallel.least(num_bytes // block_bytes, self.device))
        if self.is_asynchronous:
            self._make_ready(limits, padded_sizes(limits.batch_requests), progress)

    def _free_bytes(self, kv_memory: ShareOfFree, limits: Limits, progress: Tell) -> int:
        """Return what may be taken for KV: a share of what a warm-up with almost no cache, and a graph, leave free."""
        self._take_cache(num_blocks=1)
        self._make_ready(limits, [limits.batch_requests], progress)
        free, _ = torch.cuda.mem_get_info(self.device)
        self._graphs = None
        del self.kv_cache
        torch.cuda.empty_cache()  # a graph's memory is of no use to anything else before
        return int(free * kv_memory.share)

    def _take_cache(self, num_blocks: int) -> None:
        try:
            self.kv_cache = KVCache(self._layout, self._tensor_parallel.rank, num_blocks, self.device)
        except RuntimeError as error:  # which torch.OutOfMemoryError is one of; on a CPU it is this
            raise ConfigError(
                f"{self.device} has no memory for {num_blocks} KV blocks; lower kv_cache.memory ({error})"
            ) from error

    @torch.inference_mode()
    def _make_ready(self, limits: Limits, sizes: list[int], progress: Tell) -> None:
        scratch = Scratch(self.kv_cache.scratch_block, self._block_size, self.device)
        max_blocks = -(-limits.max_context // self._block_size)
        try:
            progress("warming up")
            warm_up(self.forward, limits, self._block_size, self.kv_cache.scratch_block)
            progress(f"capturing {len(sizes)} CUDA graphs")
            logits = self._new_logits(max(sizes))
            self._graphs = DecodeGraphs(self._compute, sizes, max_blocks, scratch, logits, cuda_capture())
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"beside the weights and {self.kv_cache.num_blocks} KV blocks there is no memory for a step of "
                f"{limits.batch_tokens} tokens; lower batch_tokens, batch_requests or kv_cache.memory ({error})"
            ) from error

    def _new_logits(self, num_rows: int) -> Tensor | None:
        """Return room for what all graphs compute: on rank 0 alone."""
        if self._tensor_parallel.rank != 0:
            return None
        return torch.empty(num_rows, self.vocab_size, dtype=torch.float32, device=self.device)
