"""The gate of a gated MLP: silu(gate) * up, from the one matrix product that made both. Called by the decoder."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import SILU_MUL


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of the last dimension; [..., 2 * size] -> [..., size]."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    num_rows = gate_up.numel() // (2 * size)
    grid = (num_rows, triton.cdiv(size, SILU_MUL.tile))
    _silu_mul[grid](gate_up, out, SIZE=size, TILE=SILU_MUL.tile, **SILU_MUL.launch)
    return out


@triton.jit
def _silu_mul(
    gate_up,  # [num_rows, 2 * SIZE]
    out,  # [num_rows, SIZE]
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=columns < SIZE)
