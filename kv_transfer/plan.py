"""Who sends which heads of which layers of which tokens to whom: pure arithmetic, without torch.

Both ends of a handoff compute the same plan from the same two layouts, so their calls match by construction. Every
other part asks here; nobody else computes with heads, ranks or blocks of two layouts, and what KV consists of only
protocol/layout.py knows. Nothing is moved here.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from math import ceil
from typing import Annotated, NamedTuple

import msgspec

from protocol.layout import UNIT_TOKENS, KVLayout, Range
from protocol.messages import Manifest

FRAME_BYTES = 4 << 20
"""Largest payload of one frame: large enough to keep a link busy, small enough to check and copy between two steps."""

MAX_UNITS = 8192
"""Units of one frame, so that its digests fit its header: many only in models with tiny heads."""

SEGMENT_TOKENS = 256
"""How much of a large prompt leaves at once while the rest is computed: long enough for large frames."""

_NO_HEADS: Range = (0, 0)


class Link(msgspec.Struct, frozen=True):
    """The heads of each plane, counted over the whole model, that one source rank sends to one destination rank."""

    source_rank: int
    destination_rank: int
    heads: tuple[Range, ...]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What a piece has of one plane: these heads, perhaps none, with so many bytes of each for every token."""

    heads: Range
    slot_bytes: Annotated[int, msgspec.Meta(ge=1)]


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What one frame of a link carries: plane after plane, each [layers, heads, tokens, dim], contiguous.

    Heads count over the whole model and tokens from the start of the prompt, so a piece means the same on both sides.
    """

    index: Annotated[int, msgspec.Meta(ge=0)]
    layers: Range
    parts: tuple[Part, ...]
    tokens: Range
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=FRAME_BYTES)]


class Rows(NamedTuple):
    """Neighbouring rows of a payload that are equally long; a row is one layer, one plane and one head.

    unit_bytes: of a whole unit; the last one of a row may be shorter.
    """

    num_bytes: int
    row_bytes: int
    unit_bytes: int


def local_heads(layout: KVLayout, rank: int, piece: Piece) -> tuple[Range, ...]:
    """Translate each part's heads into the head axis of that plane in rank's own cache."""
    return tuple(
        _NO_HEADS if part.heads == _NO_HEADS else (part.heads[0] - first, part.heads[1] - first)
        for part, (first, _) in zip(piece.parts, layout.rank_heads(rank), strict=True)
    )


def plan_transfer(source: KVLayout, destination: KVLayout) -> tuple[Link, ...]:
    """Return the links of a handoff: every destination rank gets each of its heads of each plane exactly once.

    A head that several source ranks hold is sent by one of them; those that want it are dealt out evenly over those
    that hold it. Raises ValueError, naming the difference, when the two layouts cannot hand over to one another.
    """
    difference = source.incompatibility(destination)
    if difference:
        raise ValueError(f"KV layouts of source and destination do not match: {difference}")
    source.check_split()
    destination.check_split()
    pairs: dict[tuple[int, int], list[Range]] = {}  # destination rank, source rank -> heads of each plane
    for rank in range(destination.tensor_parallel):
        for index, plane in enumerate(source.planes):
            wanted = destination.rank_heads(rank)[index]
            for source_rank in _source_ranks(plane.heads, source.tensor_parallel, destination.tensor_parallel, rank):
                heads = pairs.setdefault((rank, source_rank), [_NO_HEADS] * len(source.planes))
                heads[index] = _overlap(source.rank_heads(source_rank)[index], wanted)
    return tuple(Link(source_rank, rank, tuple(heads)) for (rank, source_rank), heads in sorted(pairs.items()))


def frames_of(
    link: Link, layout: KVLayout, first_position: int, num_tokens: int, frame_bytes: int = FRAME_BYTES
) -> tuple[Piece, ...]:
    """Cut a link's part of tokens [first_position, first_position + num_tokens) into few pieces of at most frame_bytes.

    Tokens are cut first, into segments that leave as soon as they are computed, and each segment into groups of whole
    layers; what fits one frame stays whole. All cuts of tokens are at multiples of UNIT_TOKENS, counted from the start
    of the prompt, unless not even one unit of one layer fits. Block sizes do not matter: layout may be either side's.
    """
    parts = tuple(Part(heads, plane.slot_bytes) for heads, plane in zip(link.heads, layout.planes, strict=True))
    rows = sum(map(_num_heads, parts))  # of one layer
    token_bytes = sum(_num_heads(part) * part.slot_bytes for part in parts)
    if token_bytes > frame_bytes:
        raise ValueError(f"one token of one layer has {token_bytes} bytes; a frame holds at most {frame_bytes}")
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
        Piece(index, layers, parts, tokens, token_bytes * (layers[1] - layers[0]) * (tokens[1] - tokens[0]))
        for index, (layers, tokens) in enumerate(areas)
    )


def num_units(piece: Piece) -> int:
    """Return how many units a piece has: one layer of one plane of one head for UNIT_TOKENS tokens each."""
    layers, tokens = _layers_and_tokens(piece)
    return layers * sum(map(_num_heads, piece.parts)) * ceil(tokens / UNIT_TOKENS)


def rows_of(piece: Piece) -> list[Rows]:
    """Return how a payload is cut into rows and units, all that are of one length together.

    Raises ValueError for a piece whose numbers contradict one another.
    """
    layers, tokens = _layers_and_tokens(piece)
    rows = [
        Rows(layers * tokens * slot_bytes * sum(map(_num_heads, parts)), tokens * slot_bytes, UNIT_TOKENS * slot_bytes)
        for slot_bytes, parts in groupby(piece.parts, lambda part: part.slot_bytes)
    ]
    if piece.num_bytes != sum(each.num_bytes for each in rows):
        raise ValueError(f"{piece.num_bytes} bytes for {layers} layers of {tokens} tokens in {piece.parts}")
    return [each for each in rows if each.num_bytes]


def unit_name(piece: Piece, index: int) -> str:
    """Say which unit of a piece this is, in words a person reads."""
    _, tokens = _layers_and_tokens(piece)
    row, unit = divmod(index, ceil(tokens / UNIT_TOKENS))
    rows = [
        (layer, plane, head)
        for plane, part in enumerate(piece.parts)
        for layer in range(*piece.layers)
        for head in range(*part.heads)
    ]
    layer, plane, head = rows[row]
    first = piece.tokens[0] + unit * UNIT_TOKENS
    last = min(first + UNIT_TOKENS, piece.tokens[1]) - 1
    return f"layer {layer}, plane {plane} of KV head {head}, tokens {first} to {last}"


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


def _source_ranks(num_heads: int, source_size: int, destination_size: int, rank: int) -> Iterator[int]:
    """Yield the source ranks that together send rank its heads of a plane, each head from exactly one of them."""
    wanting = max(1, destination_size // num_heads)  # ranks that want one same head
    holding = max(1, source_size // num_heads)  # ranks that hold one same head
    heads_per_source, heads_per_rank = max(1, num_heads // source_size), max(1, num_heads // destination_size)
    first = rank * num_heads // destination_size
    for share in range(first // heads_per_source, ceil((first + heads_per_rank) / heads_per_source)):
        yield share * holding + rank % wanting % holding


def _overlap(one: Range, other: Range) -> Range:
    return max(one[0], other[0]), min(one[1], other[1])


def _num_heads(part: Part) -> int:
    return part.heads[1] - part.heads[0]


def _layers_and_tokens(piece: Piece) -> tuple[int, int]:
    """Return how many of both a piece has. Raises ValueError when there is nothing in it."""
    layers, tokens = piece.layers[1] - piece.layers[0], piece.tokens[1] - piece.tokens[0]
    heads = [_num_heads(part) for part in piece.parts]
    if min(layers, tokens, sum(heads)) < 1 or min(heads) < 0:
        raise ValueError(f"a piece of {layers} layers, {heads} heads and {tokens} tokens")
    return layers, tokens


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
