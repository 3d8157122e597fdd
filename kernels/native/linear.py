"""x W^T + b for the few rows of a decode step, as fast as a CPU can read the weight. Used by kernels/linear.py.

What was tried on the way is in docs/log.md.
"""

from collections.abc import Callable

from torch import Tensor

from kernels.heap import on_huge_pages
from kernels.native.library import function

FEW_ROWS = 12
"""With more, oneDNN's packed layout is as fast or faster."""
OUTPUTS, LINE_BYTES = 4, 64  # as in the C file


def few_rows_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """Return what computes x W^T + b for x [at most FEW_ROWS, num_inputs]; None for what C does not take.

    weight: [num_outputs, num_inputs]; bias: [num_outputs].
    """
    num_outputs, size = weight.shape
    run = function("linear", "ppppiii", weight.dtype) if weight.device.type == "cpu" else None
    if run is None or num_outputs % OUTPUTS or size * weight.itemsize % LINE_BYTES:
        return None
    weight, bias = on_huge_pages(weight.contiguous()), bias if bias is None else bias.contiguous()

    def multiply(x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty((len(x), num_outputs))
        bias_at = None if bias is None else bias.data_ptr()
        run(x.data_ptr(), weight.data_ptr(), bias_at, out.data_ptr(), len(x), num_outputs, size)
        return out

    return multiply
