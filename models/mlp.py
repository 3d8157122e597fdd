"""The gated MLP of a layer, as one rank computes it: its share of the intermediate features."""

from torch import Tensor

from kernels.backend import Operations
from models.formats import RankWeights
from models.spec import MLPSpec


class MLP:
    """gate_up and down: the two linear maps, with the gate between them."""

    def __init__(self, spec: MLPSpec, weights: RankWeights, operations: Operations) -> None:
        self.gate_up = weights.column_parallel(spec.gate_up)
        self.down = weights.row_parallel(spec.down)
        self._operations = operations

    def __call__(self, normed: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size] for normed of that shape."""
        return self.down(self._operations.silu_mul(self.gate_up(normed)))
