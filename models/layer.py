"""One layer of a decoder: attention, then MLP, each on the norm of the sum of all that came before.

A decoder calls its layers one after another and knows no more of them than attend and feed_forward, so layers may
differ. There are two calls because KV may leave for other groups between them.
"""

from collections.abc import Sequence

from torch import Tensor

from kernels.backend import Operations
from models.attention import Attention
from models.formats import RankWeights
from models.inputs import BatchTensors
from models.mlp import MLP
from models.norm import RMSNorm
from models.rotary import Angles
from models.spec import LayerSpec

Stream = tuple[Tensor, Tensor]
"""What the last part computed, and the sum of all before it; each [num_tokens, hidden_size]."""


class Layer:
    """One rank's share."""

    def __init__(self, spec: LayerSpec, weights: RankWeights, operations: Operations) -> None:
        self.attention_norm = RMSNorm(spec.attention_norm, weights, operations)
        self.attention = Attention(spec.attention, weights, operations)
        self.mlp_norm = RMSNorm(spec.mlp_norm, weights, operations)
        self.mlp = MLP(spec.mlp, weights, operations)

    def attend(self, stream: Stream, batch: BatchTensors, angles: Angles, planes: Sequence[Tensor]) -> Stream:
        """Do what reads and writes this layer's planes of the cache."""
        normed, residual = self.attention_norm.add(*stream)
        return self.attention(normed, batch, angles, planes), residual

    def feed_forward(self, stream: Stream) -> Stream:
        """Do the rest."""
        normed, residual = self.mlp_norm.add(*stream)
        return self.mlp(normed), residual
