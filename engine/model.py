"""The forward pass of a dense decoder (Llama, Mistral, Qwen2, Qwen3), as one rank of a group computes it.

Called by the engine. The configuration says what differs between the families; there is no class per family.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.batch_tensors import BatchTensors
from engine.kv_cache import KVCache
from engine.rotary import cos_sin, inverse_frequencies
from engine.tensor_parallel import TensorParallel
from engine.weights import LayerWeights, ModelWeights
from kernels.backend import Operations
from protocol.model_config import ModelConfig

LayersDone = Callable[[int], None]


class Decoder:
    """Token ids in, logits out; keys and values go to the cache on the way."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, tensor_parallel: TensorParallel, operations: Operations
    ) -> None:
        self._weights = weights
        self._operations = operations
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._num_heads = len(tensor_parallel.even(config.num_heads))
        self._num_kv_heads = len(tensor_parallel.kv_heads(config.num_kv_heads))
        device = weights.final_norm.device
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)

    @torch.inference_mode()
    def forward(self, batch: BatchTensors, cache: KVCache, layers_done: LayersDone | None = None) -> Tensor | None:
        """Return logits [num_sampled, vocab_size] of the weights' type on rank 0, None on the others.

        layers_done: told how many layers' KV is in the cache, whenever it is one more (launched, on a GPU).
        """
        add_rms_norm = self._operations.add_rms_norm
        angles = cos_sin(self._inverse_frequencies, batch.positions)
        out = self._weights.embedding(batch.token_ids)  # [num_tokens, hidden_size]
        residual = torch.zeros_like(out)
        for index, layer in enumerate(self._weights.layers):
            normed, residual = add_rms_norm(out, residual, layer.attention_norm, self._eps)
            out = self._attention(layer, normed, angles, batch, cache.layer(index))
            if layers_done is not None:
                with torch.inference_mode(mode=False):  # memory that is taken meanwhile is used outside as well
                    layers_done(index + 1)
            normed, residual = add_rms_norm(out, residual, layer.mlp_norm, self._eps)
            out = layer.down(self._operations.silu_mul(layer.gate_up(normed)))
        last = batch.sampled_tokens
        normed, _ = add_rms_norm(out[last], residual[last], self._weights.final_norm, self._eps)
        return self._weights.head(normed)  # [num_sampled, vocab_size]

    def _attention(
        self,
        layer: LayerWeights,
        normed: Tensor,
        angles: tuple[Tensor, Tensor],
        batch: BatchTensors,
        cache: tuple[Tensor, ...],
    ) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        heads = layer.qkv(normed).view(len(normed), -1, self._head_dim)
        q, k, v = torch.split(heads, [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._operations.rms_norm(q, layer.q_norm, self._eps)
            k = self._operations.rms_norm(k, layer.k_norm, self._eps)
        q = self._operations.rope_and_write_kv(q, k, v, *angles, batch.slots, *cache)
        return layer.o(self._attend(q, batch, cache).view(len(normed), -1))

    def _attend(self, q: Tensor, batch: BatchTensors, cache: tuple[Tensor, ...]) -> Tensor:
        """Send single tokens and longer chunks to their own kernel; q and result: [num_tokens, num_heads, head_dim]."""
        num, tables, lens, scale = batch.num_decodes, batch.block_tables, batch.context_lens, self._head_dim**-0.5
        if num == len(lens):
            return self._operations.attention_decode(q, *cache, tables, lens, scale)
        attend = self._operations.attention_prefill
        chunks = attend(q[num:], *cache, tables[num:], batch.query_starts, lens[num:], scale)
        if num == 0:
            return chunks
        return torch.cat([self._operations.attention_decode(q[:num], *cache, tables[:num], lens[:num], scale), chunks])
