"""The gate of a gated MLP: silu(gate) * up, from the one matrix product that made both. Called by the decoder."""

from torch import Tensor

from kernels.native.library import function
from kernels.plain import silu_mul as plain


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of the last dimension; [..., 2 * size] -> [..., size]."""
    run = function("silu_mul", "ppii", gate_up.dtype)
    if run is None:
        return plain.silu_mul(gate_up)
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    run(gate_up.data_ptr(), out.data_ptr(), gate_up.numel() // (2 * size), size)
    return out
