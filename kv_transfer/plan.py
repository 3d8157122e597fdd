"""Who sends which heads of which layers of which tokens to whom: pure arithmetic, without torch.

Both ends of a handoff compute the same plan from the same two layouts, so their calls match by construction. Every
other part asks here; nobody else computes with heads, ranks or blocks. Nothing is moved here.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import ceil
from typing import Annotated

import msgspec

from protocol.layout import UNIT_TOKENS, KVLayout
from protocol.messages import Manifest

FRAME_BYTES = 4 << 20
"""Largest payload of one frame: large enough to keep a link busy, small enough to check and copy between two steps."""

MAX_UNITS = 8192
"""Units of one frame, so that its digests fit its header: many only in models with tiny heads."""

SEGMENT_TOKENS = 256
"""How much of a large prompt leaves at once while the rest is computed: long enough for large frames."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Range = tuple[int, int]
"""Half-open: the first index, and the one after the last."""


class Link(msgspec.Struct, frozen=True):
    """The KV heads, counted over the whole model, that one source rank sends to one destination rank."""

    source_rank: int
    destination_rank: int
    heads: Range


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What one frame of a link carries: [layers, 2 (key, value), heads, tokens, head_dim], contiguous.

    Heads count over the whole model and tokens from the start of the prompt, so a piece means the same on both sides.
    """

    index: Annotated[int, msgspec.Meta(ge=0)]
    layers: Range
    heads: Range
    tokens: Range
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=FRAME_BYTES)]


def heads_of_rank(layout: KVLayout, rank: int) -> Range:
    """Return the KV heads that rank holds: its even share, or one replicated head when ranks outnumber heads."""
    _check_split(layout)
    num_heads, num_ranks = layout.num_kv_heads, layout.tensor_parallel
    first = rank * num_heads // num_ranks
    return first, first + max(1, num_heads // num_ranks)


def local_heads(layout: KVLayout, rank: int, heads: Range) -> Range:
    """Translate heads of the whole model into the head axis of rank's own cache."""
    first, _ = heads_of_rank(layout, rank)
    return heads[0] - first, heads[1] - first


def plan_transfer(source: KVLayout, destination: KVLayout) -> tuple[Link, ...]:
    """Return the links of a handoff: every destination rank gets each of its heads exactly once.

    A head that several source ranks hold is sent by one of them; those that want it are dealt out evenly over those
    that hold it. Raises ValueError, naming the difference, when the two layouts cannot hand over to one another.
    """
    difference = source.incompatibility(destination)
    if difference:
        raise ValueError(f"KV layouts of source and destination do not match: {difference}")
    _check_split(source)
    _check_split(destination)
    return tuple(
        Link(source_rank, rank, _overlap(heads_of_rank(source, source_rank), heads_of_rank(destination, rank)))
        for rank in range(destination.tensor_parallel)
        for source_rank in _source_ranks(source, destination, rank)
    )


def frames_of(
    link: Link, layout: KVLayout, first_position: int, num_tokens: int, frame_bytes: int = FRAME_BYTES
) -> tuple[Piece, ...]:
    """Cut a link's part of tokens [first_position, first_position + num_tokens) into few pieces of at most frame_bytes.

    Tokens are cut first, into segments that leave as soon as they are computed, and each segment into groups of whole
    layers; what fits one frame stays whole. All cuts of tokens are at multiples of UNIT_TOKENS, counted from the start
    of the prompt, unless not even one unit of one layer fits. Block sizes do not matter: layout may be either side's.
    """
    token_bytes = 2 * (link.heads[1] - link.heads[0]) * layout.head_dim * DTYPE_BYTES[layout.dtype]
    if token_bytes > frame_bytes:
        raise ValueError(f"one token of one layer has {token_bytes} bytes; a frame holds at most {frame_bytes}")
    rows = 2 * (link.heads[1] - link.heads[0])  # of one layer
    capacity = min(frame_bytes // token_bytes, MAX_UNITS // rows * UNIT_TOKENS)  # tokens of one layer
    areas = (
        (layers, tokens)
        for segment in _cut(
            first_position, first_position + num_tokens, _segment_tokens(capacity // layout.num_layers, num_tokens)
        )
        for layers in _cut(0, layout.num_layers, _layers_per_frame(capacity, rows, segment[1] - segment[0]))
        for tokens in _cut(*segment, _whole_units(capacity))
    )
    return tuple(
        Piece(index, layers, link.heads, tokens, token_bytes * (layers[1] - layers[0]) * (tokens[1] - tokens[0]))
        for index, (layers, tokens) in enumerate(areas)
    )


def num_units(piece: Piece) -> int:
    """Return how many units a piece has: one layer's keys or values of one head for UNIT_TOKENS tokens each."""
    rows, tokens = _shape(piece)
    return rows * ceil(tokens / UNIT_TOKENS)


def row_and_unit_bytes(piece: Piece) -> tuple[int, int]:
    """Return the bytes of a row (one layer's keys or values of one head) and of a whole unit.

    Raises ValueError for a piece whose numbers contradict one another.
    """
    rows, tokens = _shape(piece)
    if piece.num_bytes % (rows * tokens):
        raise ValueError(f"{piece.num_bytes} bytes cannot be {rows} rows of {tokens} tokens")
    return piece.num_bytes // rows, piece.num_bytes // (rows * tokens) * UNIT_TOKENS


def unit_name(piece: Piece, index: int) -> str:
    """Say which unit of a piece this is, in words a person reads."""
    row, unit = divmod(index, ceil((piece.tokens[1] - piece.tokens[0]) / UNIT_TOKENS))
    rest, head = divmod(row, piece.heads[1] - piece.heads[0])
    first = piece.tokens[0] + unit * UNIT_TOKENS
    last = min(first + UNIT_TOKENS, piece.tokens[1]) - 1
    kind = ("keys", "values")[rest % 2]
    return f"layer {piece.layers[0] + rest // 2}, {kind} of KV head {piece.heads[0] + head}, tokens {first} to {last}"


def manifest_of(
    source: KVLayout, destination: KVLayout, first_position: int, num_tokens: int, frame_bytes: int = FRAME_BYTES
) -> Manifest:
    """Return what all frames of this transfer add up to, over all pairs of ranks."""
    sizes = [
        piece.num_bytes
        for link in plan_transfer(source, destination)
        for piece in frames_of(link, source, first_position, num_tokens, frame_bytes)
    ]
    return Manifest(first_position, num_tokens, len(sizes), sum(sizes))


def check_table(block_ids: tuple[int, ...], block_size: int, num_blocks: int, num_positions: int) -> None:
    """Raise ValueError when a block table cannot hold num_positions tokens in a cache of num_blocks blocks."""
    if len(block_ids) * block_size < num_positions:
        raise ValueError(f"{len(block_ids)} blocks of {block_size} slots cannot hold {num_positions} tokens")
    outside = next((block_id for block_id in block_ids if not 0 <= block_id < num_blocks), None)
    if outside is not None:
        raise ValueError(f"block {outside} does not exist; the cache has blocks 0 to {num_blocks - 1}")


def _check_split(layout: KVLayout) -> None:
    num_heads, num_ranks = layout.num_kv_heads, layout.tensor_parallel
    if num_heads < 1 or num_ranks < 1 or (num_heads % num_ranks and num_ranks % num_heads):
        raise ValueError(f"{num_heads} KV heads cannot be split over {num_ranks} ranks; one must divide the other")


def _source_ranks(source: KVLayout, destination: KVLayout, rank: int) -> Iterator[int]:
    """Yield the source ranks that together send rank its heads, each head from exactly one of them."""
    wanting = max(1, destination.tensor_parallel // destination.num_kv_heads)  # ranks that want one same head
    holding = max(1, source.tensor_parallel // source.num_kv_heads)  # ranks that hold one same head
    heads_per_source = max(1, source.num_kv_heads // source.tensor_parallel)
    first, stop = heads_of_rank(destination, rank)
    for share in range(first // heads_per_source, ceil(stop / heads_per_source)):
        yield share * holding + rank % wanting % holding


def _overlap(one: Range, other: Range) -> Range:
    return max(one[0], other[0]), min(one[1], other[1])


def _shape(piece: Piece) -> tuple[int, int]:
    """Return rows and tokens of a piece. Raises ValueError when it has none."""
    layers, heads, tokens = (stop - start for start, stop in (piece.layers, piece.heads, piece.tokens))
    if min(layers, heads, tokens) < 1:
        raise ValueError(f"a piece of {layers} layers, {heads} heads and {tokens} tokens")
    return layers * 2 * heads, tokens


def _layers_per_frame(capacity: int, rows: int, num_tokens: int) -> int:
    return max(1, min(capacity // num_tokens, MAX_UNITS // (rows * ceil(num_tokens / UNIT_TOKENS))))


def _segment_tokens(capacity: int, num_tokens: int) -> int:
    """Return the length of a segment, given how many tokens of all layers fit one frame."""
    return num_tokens if num_tokens <= capacity else max(SEGMENT_TOKENS, _whole_units(capacity))


def _cut(start: int, stop: int, size: int) -> Iterator[Range]:
    """Cut [start, stop) at every multiple of size, unless it is no longer than size."""
    if stop - start <= size:
        cuts = [start, stop] if start < stop else []
    else:
        cuts = [start, *range((start // size + 1) * size, stop, size), stop]
    return pairwise(cuts)


def _whole_units(num_tokens: int) -> int:
    """Round num_tokens down to whole units, if there is at least one."""
    return num_tokens // UNIT_TOKENS * UNIT_TOKENS or num_tokens
