"""The layers that tensor parallelism splits: linear maps by columns or by rows, the vocabulary by token ids.

Each holds one rank's slice of its weights and makes the group's ranks meet where partial results must be added up or
gathered. Put together by the weights, called by the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from engine.tensor_parallel import Range, TensorParallel

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


@dataclass(frozen=True, slots=True)
class VocabularyEmbedding:
    """weight: [vocabulary_width, hidden_size], rows of token_ids, then zeros where a shard is short. Ranks meet."""

    weight: Tensor
    token_ids: Range
    tensor_parallel: TensorParallel

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings: [num_tokens, hidden_size]."""
        if self.tensor_parallel.size == 1:
            return functional.embedding(token_ids, self.weight)
        is_foreign = (token_ids < self.token_ids.start) | (token_ids >= self.token_ids.stop)
        rows = (token_ids - self.token_ids.start).masked_fill(is_foreign, 0)
        embedded = functional.embedding(rows, self.weight).masked_fill_(is_foreign.unsqueeze(1), 0)
        return self.tensor_parallel.all_reduce(embedded)


@dataclass(frozen=True, slots=True)
class VocabularyHead:
    """local: hidden_size inputs to vocabulary_width outputs, with the embedding's shards. Ranks meet."""

    local: LinearMap
    vocab_size: int
    tensor_parallel: TensorParallel

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """Return logits [num_rows, vocab_size] on rank 0 and None on the others, of the weights' type."""
        logits = self.tensor_parallel.gather_to_leader(self.local(hidden))
        return None if logits is None else logits[:, : self.vocab_size]
