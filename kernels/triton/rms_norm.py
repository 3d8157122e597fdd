"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and fused with the residual addition before it.

Called by the decoder on hidden states, and per head on queries and keys. Each element is read and written once.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import RMS_NORM, padded


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; x: [..., size], weight: [size]."""
    out = x.new_empty(x.shape)
    _launch(x, None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual): the next layer's input and the new residual stream."""
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, residual, weight, out, total, eps)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float) -> None:
    """Run over all rows. Heads of a wider row, as queries are cut from q, k and v in one, need no copy first."""
    size = x.shape[-1]
    groups = x if x.ndim == 3 else x.reshape(-1, 1, size)  # [num_groups, rows_per_group, size]
    assert groups.stride(2) == 1
    assert groups.shape[1] == 1 or groups.stride(1) == size
    config = RMS_NORM[padded(size)]
    num_rows = groups.shape[0] * groups.shape[1]
    _rms_norm[(triton.cdiv(num_rows, config.rows),)](
        groups,
        None if residual is None else residual.contiguous(),
        weight,
        out,
        total,
        eps,
        num_rows,
        groups.stride(0),
        ROWS_PER_GROUP=groups.shape[1],
        SIZE=size,
        ROWS=config.rows,
        COLUMNS=config.tile,
        **config.launch,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x,  # [num_groups, ROWS_PER_GROUP, SIZE], groups group_stride apart
    residual,  # [num_rows, SIZE], or None
    weight,  # [SIZE]
    out,  # [num_rows, SIZE]
    total,  # [num_rows, SIZE], x + residual; None without residual
    eps,
    num_rows,
    group_stride,
    ROWS_PER_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_element = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    starts = (rows // ROWS_PER_GROUP).to(tl.int64) * group_stride + rows % ROWS_PER_GROUP * SIZE
    offsets = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    dtype = out.dtype.element_ty
    values = tl.load(x + starts[:, None] + columns[None, :], mask=is_element, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + offsets, mask=is_element, other=0.0).to(tl.float32)
        values = values.to(dtype).to(tl.float32)  # the norm is that of the sum as the next layer will read it
        tl.store(total + offsets, values.to(dtype), mask=is_element)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / SIZE + eps)  # [ROWS]
    normed = (values * scale[:, None]).to(dtype).to(tl.float32)  # rounded before the weight, as models are trained
    weights = tl.load(weight + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    tl.store(out + offsets, (normed * weights[None, :]).to(dtype), mask=is_element)
