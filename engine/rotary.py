"""Angles of the rotary position embedding, plain or with Llama 3's frequency scaling. Called once per forward pass.

The rotation itself is a kernel.
"""

import math

import torch
from torch import Tensor

from protocol.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return how far each pair of dimensions turns per position: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    return frequencies if rope.factor is None else _scaled_as_llama3(frequencies, rope)


def _scaled_as_llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Slow down the long waves by factor, keep the short ones, and blend in between (Llama 3.1 model card, 2024)."""
    assert rope.factor
    assert rope.low_freq_factor
    assert rope.high_freq_factor
    assert rope.original_max_position
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # within the context of pre-training
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = share.clamp(0.0, 1.0)  # of the unscaled frequency
    return frequencies * (share + (1.0 - share) / rope.factor)


def cos_sin(inverse_frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every token's angles: float32 [num_tokens, head_dim / 2] each."""
    angles = positions.float().unsqueeze(1) * inverse_frequencies
    return angles.cos(), angles.sin()
