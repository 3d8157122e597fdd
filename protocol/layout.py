"""What KV consists of, how one group lays it out in its cache, and where its ranks listen for frames.

Pure data, and the arithmetic of one group alone: whoever has to know how large KV is, or which of it a rank holds, asks
here. What two groups hand over to one another is the business of kv_transfer/plan.py.
"""

import msgspec

from protocol.errors import ConfigError
from protocol.identity import Epoch

UNIT_TOKENS = 16
"""Tokens under one digest: the smallest block size, so that digests are equal whatever the layouts of the two sides."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Range = tuple[int, int]
"""Half-open: the first index, and the one after the last."""


class Plane(msgspec.Struct, frozen=True):
    """One of the parts of KV, the same in every layer: dim numbers of dtype for each head of each token.

    heads are those of the whole model, before any split. Numbers of one plane lie together, those of two never do.
    """

    heads: int
    dim: int
    dtype: str

    @property
    def slot_bytes(self) -> int:
        """Bytes of one head of one token."""
        return self.dim * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.heads} x {self.dim} {self.dtype}"


def keys_and_values(num_kv_heads: int, head_dim: int, dtype: str) -> tuple[Plane, ...]:
    """Return the planes of a model that caches keys and values: plane 0 and plane 1.

    Raises ConfigError for a dtype that KV cannot have.
    """
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"KV cannot be kept as {dtype}; choose one of {', '.join(DTYPE_BYTES)}")
    plane = Plane(num_kv_heads, head_dim, dtype)
    return plane, plane


class KVLayout(msgspec.Struct, frozen=True):
    """The shape of one group's KV cache.

    Rank r of a group holds heads [r * heads / tp, (r + 1) * heads / tp) of a plane, or, when that has fewer heads than
    there are ranks, the one head r * heads // tp, replicated.
    """

    model_hash: str
    num_layers: int
    planes: tuple[Plane, ...]
    block_size: int
    tensor_parallel: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on each rank: block_size tokens in every plane of every layer."""
        widths = ((stop - first, plane) for plane, (first, stop) in zip(self.planes, self.rank_heads(0), strict=True))
        return self.num_layers * self.block_size * sum(heads * plane.slot_bytes for heads, plane in widths)

    def rank_heads(self, rank: int) -> tuple[Range, ...]:
        """Return the heads that rank holds of each plane. Raises ValueError when heads cannot be split over the ranks.

        Heads count over the whole model.
        """
        self.check_split()
        size = self.tensor_parallel
        firsts = [rank * plane.heads // size for plane in self.planes]
        return tuple(
            [(first, first + (plane.heads // size or 1)) for first, plane in zip(firsts, self.planes, strict=True)]
        )

    def rank_shapes(self, rank: int, num_blocks: int) -> list[tuple[int, int, int, int, int]]:
        """Return how rank keeps each plane in num_blocks blocks: [num_layers, num_blocks, heads, block_size, dim]."""
        return [
            (self.num_layers, num_blocks, stop - first, self.block_size, plane.dim)
            for plane, (first, stop) in zip(self.planes, self.rank_heads(rank), strict=True)
        ]

    def check_split(self) -> None:
        """Raise ValueError, saying which, when the heads of a plane cannot be split over the ranks."""
        ranks = self.tensor_parallel
        for plane in self.planes:
            heads = plane.heads
            if heads < 1 or ranks < 1 or (heads % ranks and ranks % heads):
                raise ValueError(f"{heads} KV heads cannot be split over {ranks} ranks; one must divide the other")

    @property
    def common(self) -> dict[str, str | int | tuple[Plane, ...]]:
        """Return what must be equal on both sides of a handoff; block size and tensor-parallel size may differ."""
        return {
            "model_hash": self.model_hash,
            "num_layers": self.num_layers,
            "KV geometry": self.planes,
        }

    def incompatibility(self, other: "KVLayout") -> str | None:
        """Name the first thing that must be equal on both sides of a handoff but is not, with both values."""
        theirs = other.common
        return next(
            (
                f"{name} differs: {_words(ours)} and {_words(theirs[name])}"
                for name, ours in self.common.items()
                if ours != theirs[name]
            ),
            None,
        )


class Endpoint(msgspec.Struct, frozen=True):
    """A group as its peers see it: one KV address per rank, valid for one epoch only."""

    epoch: Epoch
    layout: KVLayout
    transport: str
    addresses: tuple[str, ...]


def _words(value: str | int | tuple[Plane, ...]) -> str:
    """Return what a person reads: of planes, heads by dimensions, as "8 x 128 bfloat16 + 8 x 128 bfloat16"."""
    return " + ".join(map(str, value)) if isinstance(value, tuple) else str(value)
