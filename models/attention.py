"""Grouped-query attention of a layer, as one rank computes it: its share of the heads, over a paged cache.

Another kind of attention is a file beside this one, with a class that is called the same way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import Operations
from models.formats import RankWeights
from models.inputs import BatchTensors
from models.norm import RMSNorm
from models.rotary import Angles
from models.spec import AttentionSpec


class Attention:
    """qkv and o: the linear maps before and after; q_norm and k_norm: of each head, where there are."""

    def __init__(self, spec: AttentionSpec, weights: RankWeights, operations: Operations) -> None:
        share = weights.tensor_parallel.share
        self.qkv = weights.column_parallel(spec.qkv)
        self.o = weights.row_parallel(spec.o)
        self.q_norm = RMSNorm(spec.q_norm, weights, operations) if spec.q_norm else None
        self.k_norm = RMSNorm(spec.k_norm, weights, operations) if spec.k_norm else None
        self._operations = operations
        self._rope = spec.rope
        self._head_dim = spec.head_dim
        self._split = [len(share(spec.heads)), len(share(spec.kv_heads)), len(share(spec.kv_heads))]
        self._scale = spec.head_dim**-0.5

    def __call__(self, normed: Tensor, batch: BatchTensors, angles: Angles, planes: Sequence[Tensor]) -> Tensor:
        """Return [num_tokens, hidden_size] for normed of that shape; keys and values go to the cache on the way.

        planes: keys and values of this layer, each [num_blocks, num_local_kv_heads, block_size, head_dim].
        """
        heads = self.qkv(normed).view(len(normed), -1, self._head_dim)
        q, k, v = torch.split(heads, self._split, dim=1)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q = self._operations.rope_and_write_kv(q, k, v, *angles[self._rope], batch.slots, *planes)
        return self.o(self._attend(q, batch, planes).view(len(normed), -1))

    def _attend(self, q: Tensor, batch: BatchTensors, planes: Sequence[Tensor]) -> Tensor:
        """Send single tokens and longer chunks to their own kernel; q and result: [num_tokens, num_heads, head_dim]."""
        num, tables, lens, scale = batch.num_decodes, batch.block_tables, batch.context_lens, self._scale
        if num == len(lens):
            return self._operations.attention_decode(q, *planes, tables, lens, scale)
        attend = self._operations.attention_prefill
        chunks = attend(q[num:], *planes, tables[num:], batch.query_starts, lens[num:], scale)
        if num == 0:
            return chunks
        return torch.cat([self._operations.attention_decode(q[:num], *planes, tables[:num], lens[:num], scale), chunks])
