"""The gate of a gated MLP: silu(gate) * up, from the one matrix product that made both. Called by the decoder."""

from torch import Tensor
from torch.nn import functional


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of the last dimension; [..., 2 * size] -> [..., size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
