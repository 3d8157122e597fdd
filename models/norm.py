"""The root mean square norm. Its weight is whole on every rank."""

from torch import Tensor

from kernels.backend import Operations
from models.formats import RankWeights
from models.spec import NormSpec


class RMSNorm:
    """weight: [size]."""

    def __init__(self, spec: NormSpec, weights: RankWeights, operations: Operations) -> None:
        self.weight = weights.vector(f"{spec.name}.weight")
        self._eps = spec.eps
        self._operations = operations

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [..., size] normed over its last dimension."""
        return self._operations.rms_norm(x, self.weight, self._eps)

    def add(self, out: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of out + residual, and that sum, each [num_rows, size]."""
        return self._operations.add_rms_norm(out, residual, self.weight, self._eps)
