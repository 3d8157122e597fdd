"""The two ends of a decoder that tensor parallelism splits by token ids: the embedding and the head.

Each rank holds the rows of its token ids; the ranks meet where embeddings are added up and where logits are gathered.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.linear import Linear
from models.formats import RankWeights, Tensors
from models.linear import LinearMap
from models.spec import Shape, VocabularySpec
from models.tensor_parallel import Range, TensorParallel


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


def stored_names(spec: VocabularySpec, tensors: Tensors) -> tuple[str, str]:
    """Return the tensors that embedding and head are read from.

    A model that ties them may store either for both. It may also store both, and then each is read for itself: they
    differ where the head was trained on alone.
    """
    if not spec.is_tied:
        return spec.embedding, spec.head
    if spec.embedding not in tensors and spec.head in tensors:
        return spec.head, spec.head
    return spec.embedding, spec.head if spec.head in tensors else spec.embedding


def vocabulary_tensors(spec: VocabularySpec, tensors: Tensors) -> dict[str, Shape]:
    """Return name and shape of what a checkpoint must hold for embedding and head."""
    return dict.fromkeys(stored_names(spec, tensors), (spec.size, spec.hidden_size))


def load_vocabulary(spec: VocabularySpec, weights: RankWeights) -> tuple[VocabularyEmbedding, VocabularyHead]:
    """Return this rank's shards of embedding and head, which are one tensor where they are equal."""
    embedding_name, head_name = stored_names(spec, weights.tensors)
    group = weights.tensor_parallel
    shard = _shard(spec, embedding_name, weights)
    head_shard = shard if head_name == embedding_name else _shard(spec, head_name, weights)
    if spec.is_tied and torch.equal(shard, head_shard):
        head_shard = shard
    embedding = VocabularyEmbedding(shard, group.vocabulary(spec.size), group)
    return embedding, VocabularyHead(Linear(head_shard), spec.size, group)


def _shard(spec: VocabularySpec, name: str, weights: RankWeights) -> Tensor:
    group = weights.tensor_parallel
    shard, width = weights.tensors.rows(name, group.vocabulary(spec.size)), group.vocabulary_width(spec.size)
    return functional.pad(shard, (0, 0, 0, width - len(shard))) if len(shard) < width else shard
