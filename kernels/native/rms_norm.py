"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and fused with the residual addition before it.

Called by the decoder on hidden states, and per head on queries and keys.
"""

import torch
from torch import Tensor

from kernels.native.library import function
from kernels.plain import rms_norm as plain


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; x: [..., size], weight: [size]."""
    run = function("rms_norm", "pppiiiif", x.dtype)
    if run is None:
        return plain.rms_norm(x, weight, eps)
    size = x.shape[-1]
    groups = x if x.ndim == 3 else x.reshape(-1, 1, size)  # heads of a wider row need no copy first
    if groups.stride()[1:] != (size, 1):
        groups = groups.contiguous()
    out = x.new_empty(x.shape)
    pointers = groups.data_ptr(), weight.contiguous().data_ptr(), out.data_ptr()
    run(*pointers, groups.shape[0], groups.shape[1], groups.stride(0), size, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual): the next layer's input and the new residual stream."""
    run = function("add_rms_norm", "pppppiif", x.dtype)
    if run is None:
        return plain.add_rms_norm(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    pointers = (tensor.data_ptr() for tensor in (x, residual, weight, out, total))
    run(*pointers, x.numel() // size, size, eps)
    return out, total
