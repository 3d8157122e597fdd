"""The forward pass of a decoder as one rank of a group computes it: embedding, layer after layer, head.

Built and called by the engine. What a layer is made of is the model's description to say (spec.py).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import Operations
from models.checkpoint import open_checkpoint
from models.formats import RankWeights, Tensors
from models.inputs import BatchTensors
from models.layer import Layer
from models.norm import RMSNorm
from models.rotary import cos_sin, inverse_frequencies
from models.spec import DecoderSpec
from models.tensor_parallel import TensorParallel
from models.vocabulary import load_vocabulary
from protocol.progress import Tell

LayersDone = Callable[[int], None]
LayerPlanes = Callable[[int], Sequence[Tensor]]
"""The cache's planes of the layer of that index, as its attention wants them."""


class Decoder:
    """Token ids in, logits out; keys and values go to the cache on the way."""

    def __init__(self, spec: DecoderSpec, weights: RankWeights, operations: Operations, progress: Tell) -> None:
        """Read this rank's share of the weights."""
        num_parts = len(spec.layers) + 1
        progress(f"weights 1 of {num_parts}")
        self.embedding, self.head = load_vocabulary(spec.vocabulary, weights)
        self.layers: list[Layer] = []
        for index, layer in enumerate(spec.layers):
            progress(f"weights {index + 2} of {num_parts}")
            self.layers.append(Layer(layer, weights.within(spec.prefix(index)), operations))
        self.final_norm = RMSNorm(spec.final_norm, weights, operations)
        ropes = {layer.attention.rope for layer in spec.layers}
        self._frequencies = {rope: inverse_frequencies(rope).to(self.embedding.weight.device) for rope in ropes}

    @torch.inference_mode()
    def forward(self, batch: BatchTensors, planes: LayerPlanes, layers_done: LayersDone | None = None) -> Tensor | None:
        """Return logits [num_sampled, vocab_size] of the weights' type on rank 0, None on the others.

        layers_done: told how many layers' KV is in the cache, whenever it is one more (launched, on a GPU).
        """
        angles = {rope: cos_sin(frequencies, batch.positions) for rope, frequencies in self._frequencies.items()}
        out = self.embedding(batch.token_ids)  # [num_tokens, hidden_size]
        stream = out, torch.zeros_like(out)
        for index, layer in enumerate(self.layers):
            stream = layer.attend(stream, batch, angles, planes(index))
            if layers_done is not None:
                with torch.inference_mode(mode=False):  # memory that is taken meanwhile is used outside as well
                    layers_done(index + 1)
            stream = layer.feed_forward(stream)
        out, residual = (part[batch.sampled_tokens] for part in stream)
        normed, _ = self.final_norm.add(out, residual)
        return self.head(normed)


def load_decoder(
    source: Path | Tensors,
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    tensor_parallel: TensorParallel,
    operations: Operations,
    progress: Tell,
) -> Decoder:
    """Build this rank's decoder, from a folder if source is one. Raise ConfigError for what does not fit.

    A folder's tensors are brought to dtype and device; other sources give what is to be used.
    """
    tensors = open_checkpoint(source, spec, dtype, device) if isinstance(source, Path) else source
    return Decoder(spec, RankWeights(tensors, tensor_parallel), operations, progress)
