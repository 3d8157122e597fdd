"""Linear maps that tensor parallelism splits, by columns or by rows.

Each holds one rank's slice of its weight; where the ranks' results are parts of a sum, calling it makes the ranks meet.
Put together by formats.py, called by attention and MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.tensor_parallel import TensorParallel

LinearMap = Callable[[Tensor], Tensor]
"""[num_rows, num_inputs] -> [num_rows, num_outputs], as kernels/linear.py makes one of a weight."""


@dataclass(frozen=True, slots=True)
class ColumnParallelLinear:
    """A linear map whose outputs are split over the ranks; local: all inputs to this rank's outputs, with bias."""

    local: LinearMap

    def __call__(self, x: Tensor) -> Tensor:
        return self.local(x)


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """A linear map whose inputs are split over the ranks; local: this rank's inputs to all outputs. Ranks meet."""

    local: LinearMap
    bias: Tensor | None
    tensor_parallel: TensorParallel

    def __call__(self, x: Tensor) -> Tensor:
        out = self.tensor_parallel.all_reduce(self.local(x))
        return out if self.bias is None else out + self.bias
