"""How one group lays out its KV cache, and where its ranks listen for frames.

Pure data; the arithmetic on it lives in kv_transfer/plan.py alone.
"""

import msgspec

from protocol.identity import Epoch

UNIT_TOKENS = 16
"""Tokens under one digest: the smallest block size, so that digests are equal whatever the layouts of the two sides."""


class KVLayout(msgspec.Struct, frozen=True):
    """The shape of one group's KV cache. num_kv_heads counts the whole model's heads, before any split.

    Rank r of a group holds heads [r * num_kv_heads / tp, (r + 1) * num_kv_heads / tp), or, when there are fewer heads
    than ranks, the one head r * num_kv_heads // tp, replicated.
    """

    model_hash: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    tensor_parallel: int

    @property
    def common(self) -> dict[str, str | int]:
        """Return what must be equal on both sides of a handoff; block size and tensor-parallel size may differ."""
        return {
            "model_hash": self.model_hash,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
        }

    def incompatibility(self, other: "KVLayout") -> str | None:
        """Name the first field that must be equal on both sides of a handoff but is not, with both values."""
        theirs = other.common
        return next(
            (f"{n} differs: {ours} and {theirs[n]}" for n, ours in self.common.items() if ours != theirs[n]), None
        )


class Endpoint(msgspec.Struct, frozen=True):
    """A group as its peers see it: one KV address per rank, valid for one epoch only."""

    epoch: Epoch
    layout: KVLayout
    transport: str
    addresses: tuple[str, ...]
