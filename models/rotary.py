"""Angles of the rotary position embeddings of a model, plain or with Llama 3's frequency scaling.

Computed once per forward pass for all layers. The rotation itself is a kernel.
"""

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from models.spec import Llama3Scaling, RopeSpec

Angles: TypeAlias = Mapping[RopeSpec, tuple[Tensor, Tensor]]
"""Cosine and sine of every token's angles, float32 [num_tokens, head_dim / 2] each, for each embedding of a model."""


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Return how far each pair of dimensions turns per position: float32 [head_dim / 2]."""
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim
    frequencies = 1.0 / rope.theta**exponents
    return frequencies if rope.scaling is None else _scaled_as_llama3(frequencies, rope.scaling)


def _scaled_as_llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Slow down the long waves by factor, keep the short ones, and blend in between (Llama 3.1 model card, 2024)."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # within the context of pre-training
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0.0, 1.0)  # of the unscaled frequency
    return frequencies * (share + (1.0 - share) / scaling.factor)


def cos_sin(inverse_frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every token's angles: float32 [num_tokens, head_dim / 2] each."""
    angles = positions.float().unsqueeze(1) * inverse_frequencies
    return angles.cos(), angles.sin()
