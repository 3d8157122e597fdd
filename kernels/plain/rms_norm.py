"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and fused with the residual addition before it.

Called by the decoder on hidden states, and per head on queries and keys. The mean square is taken in float32.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; x: [..., size], weight: [size]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual): the next layer's input and the new residual stream."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual
