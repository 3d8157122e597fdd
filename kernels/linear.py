"""x W^T + b for a weight that never changes, made ready once for what its device is good at. Called by all layers.

On a CPU a few rows, as in decode, take as long as reading the weight, and C reads it in order. For many rows oneDNN
computes in a layout of its own and would bring a plain weight into it at every call, so it gets a second copy, packed
once. The operations that pack are private to torch: where they are missing, or do not take this weight, torch's plain
linear serves. Where there is no C, few rows go the way of many.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.native.linear import FEW_ROWS, few_rows_linear

PACKED_FOR_ROWS = 64
"""The number of rows that the layout is chosen for; it was measured to serve well from 1 to 2048."""


class Linear:
    """A linear map. weight: [num_outputs, num_inputs]; bias: [num_outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        packed = _pack(weight)
        self.bias = bias
        self.weight = weight if packed is None else packed
        self._multiply = functional.linear if packed is None else _multiply_packed
        self._multiply_few = few_rows_linear(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [num_rows, num_outputs] for x [num_rows, num_inputs]."""
        if self._multiply_few is not None and len(x) <= FEW_ROWS:
            return self._multiply_few(x)
        return self._multiply(x, self.weight, self.bias)


def _pack(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu":
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        _multiply_packed(weight.new_zeros(1, weight.shape[1]), packed, None)
    except (AttributeError, RuntimeError):
        return None
    return packed


def _multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
