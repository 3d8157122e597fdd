"""How a linear map is stored in a checkpoint, and how a rank makes its share of it: slice, merge, one product.

Used by the layers while they are built. The one format today is a matrix of floats, [num_outputs, num_inputs].
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.linear import Linear
from models.linear import ColumnParallelLinear, RowParallelLinear
from models.spec import ColumnParallelSpec, RowParallelSpec
from models.tensor_parallel import Range, TensorParallel


class Tensors(Protocol):
    """What weights are made of, on their device: a checkpoint, or, to measure speed, anything of its shapes."""

    def __contains__(self, name: object) -> bool: ...

    def whole(self, name: str) -> Tensor: ...

    def rows(self, name: str, rows: Range) -> Tensor:
        """Return rows of a matrix, or elements of a vector."""

    def columns(self, name: str, columns: Range) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class RankWeights:
    """One rank's share of a model's weights. prefix comes before every name that is asked for."""

    tensors: Tensors
    tensor_parallel: TensorParallel
    prefix: str = ""

    def within(self, prefix: str) -> "RankWeights":
        return replace(self, prefix=self.prefix + prefix)

    def vector(self, name: str) -> Tensor:
        """Return a vector that every rank has whole: a norm's weight, a bias of what is added up."""
        return self.tensors.whole(self.prefix + name)

    def column_parallel(self, spec: ColumnParallelSpec) -> ColumnParallelLinear:
        """Return the map of all of spec's parts, so that they are one product."""
        weight = self._merged(spec, "weight")
        return ColumnParallelLinear(Linear(weight, self._merged(spec, "bias") if spec.has_bias else None))

    def _merged(self, spec: ColumnParallelSpec, kind: str) -> Tensor:
        rows = self.tensors.rows
        return torch.cat([rows(f"{self.prefix}{name}.{kind}", own) for name, own in self._rows(spec)])

    def _rows(self, spec: ColumnParallelSpec) -> Iterator[tuple[str, Range]]:
        """Yield where each part's own rows are stored: behind those of the parts before it in the same matrix."""
        taken: Counter[str] = Counter()
        for part in spec.parts:
            own = self.tensor_parallel.share(part.split).times(part.width)
            yield part.name, own.moved(taken[part.name])
            taken[part.name] += len(part)

    def row_parallel(self, spec: RowParallelSpec) -> RowParallelLinear:
        """Return the map of this rank's inputs, whose results are added up over the ranks."""
        own = self.tensor_parallel.share(spec.split).times(spec.width)
        weight = self.tensors.columns(f"{self.prefix}{spec.name}.weight", own)
        bias = self.vector(f"{spec.name}.bias") if spec.has_bias else None
        return RowParallelLinear(Linear(weight), bias, self.tensor_parallel)
