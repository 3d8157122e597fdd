"""The transfer plan against a brute force: all of each plane reaches every rank that holds it exactly once."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.plan import (
    FRAME_BYTES,
    MAX_UNITS,
    SEGMENT_TOKENS,
    Part,
    Piece,
    check_table,
    frames_of,
    local_heads,
    manifest_of,
    num_units,
    plan_transfer,
)
from protocol.errors import ConfigError
from protocol.layout import UNIT_TOKENS, KVLayout, Plane, keys_and_values

SIZES = (1, 2, 4, 8)
sizes = st.sampled_from(SIZES)


def layout(tensor_parallel: int, num_kv_heads: int, **changes: object) -> KVLayout:
    plain = KVLayout("m", 3, keys_and_values(num_kv_heads, 8, "float32"), 16, tensor_parallel)
    return msgspec.structs.replace(plain, **changes)


def owned_heads(num_kv_heads: int, tensor_parallel: int, rank: int) -> set[int]:
    """Heads of rank, written down from the definition: lay heads and ranks along one line and see which overlap."""
    return {
        head
        for head in range(num_kv_heads)
        if head * tensor_parallel < (rank + 1) * num_kv_heads and rank * num_kv_heads < (head + 1) * tensor_parallel
    }


@pytest.mark.parametrize(("num_kv_heads", "tensor_parallel"), list(itertools.product(SIZES, SIZES)))
def test_a_rank_holds_its_share_of_the_heads_or_one_replicated_head(num_kv_heads, tensor_parallel):
    for rank in range(tensor_parallel):
        for first, stop in layout(tensor_parallel, num_kv_heads).rank_heads(rank):
            assert set(range(first, stop)) == owned_heads(num_kv_heads, tensor_parallel, rank)


PLANES = {
    **{f"keys and values of {heads} heads": keys_and_values(heads, 8, "float32") for heads in SIZES},
    "one plane, replicated": (Plane(1, 24, "bfloat16"),),
    "two planes of one head each, of other widths": (Plane(1, 64, "float32"), Plane(1, 192, "bfloat16")),
    "keys, values and their scales": (*keys_and_values(4, 32, "float16"), *keys_and_values(4, 1, "float32")),
    "planes of unequally many heads": (Plane(8, 16, "float32"), Plane(1, 4, "float32"), Plane(2, 12, "bfloat16")),
}
Cell = tuple[int, int, int, int]
"""Plane, layer, head, token."""


def cells(spans: list[set[int]], layers: Iterable[int], tokens: Iterable[int]) -> Iterator[Cell]:
    """Yield the cells of these heads of each plane, in the order of a payload."""
    for plane, heads in enumerate(spans):
        for layer, head, token in itertools.product(layers, sorted(heads), tokens):
            yield plane, layer, head, token


@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
def test_every_plane_layer_head_and_token_reaches_every_destination_rank_exactly_once(planes):
    """For every pair of sizes, with block sizes of all kinds, from a rank that has it, in pieces of the right size."""
    block_sizes = itertools.cycle(itertools.product((16, 32, 128), repeat=2))
    for source_tp, destination_tp in itertools.product(SIZES, repeat=2):
        source, destination = (
            layout(size, 1, planes=planes, block_size=block_size)
            for size, block_size in zip((source_tp, destination_tp), next(block_sizes), strict=True)
        )
        carried: Counter[tuple[int, Cell]] = Counter()
        num_bytes = 0
        for link in plan_transfer(source, destination):
            for plane, heads in zip(planes, link.heads, strict=True):
                assert set(range(*heads)) <= owned_heads(plane.heads, source_tp, link.source_rank)
            for piece in frames_of(link, source, first_position=16, num_tokens=37, frame_bytes=2048):
                held = [set(range(*part.heads)) for part in piece.parts]
                there = list(cells(held, range(*piece.layers), range(*piece.tokens)))
                assert piece.num_bytes == sum(slot_bytes(planes[plane]) for plane, *_ in there) <= 2048
                carried.update((link.destination_rank, cell) for cell in there)
                num_bytes += piece.num_bytes
        wanted = {
            (rank, cell)
            for rank in range(destination_tp)
            for cell in cells(
                [owned_heads(plane.heads, destination_tp, rank) for plane in planes], range(3), range(16, 53)
            )
        }
        assert carried == Counter(wanted)
        assert manifest_of(source, destination, 16, 37, 2048).num_bytes == num_bytes


def slot_bytes(plane: Plane) -> int:
    return plane.dim * (4 if plane.dtype == "float32" else 2)


@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
def test_those_that_want_a_head_are_dealt_out_evenly_over_those_that_hold_it(planes):
    for source_tp, destination_tp in itertools.product(SIZES, repeat=2):
        links = plan_transfer(layout(source_tp, 1, planes=planes), layout(destination_tp, 1, planes=planes))
        assert len({(link.source_rank, link.destination_rank) for link in links}) == len(links)
        for index, plane in enumerate(planes):
            for head in range(plane.heads):
                holders = [rank for rank in range(source_tp) if head in owned_heads(plane.heads, source_tp, rank)]
                sent = Counter(
                    link.source_rank for link in links if link.heads[index][0] <= head < link.heads[index][1]
                )
                loads = [sent[rank] for rank in holders]
                assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("planes", PLANES.values(), ids=PLANES)
def test_a_rank_keeps_as_many_bytes_as_its_blocks_have(planes):
    for tensor_parallel, block_size in itertools.product(SIZES, (16, 128)):
        shape = layout(tensor_parallel, 1, planes=planes, block_size=block_size)
        for rank in range(tensor_parallel):
            held = [owned_heads(plane.heads, tensor_parallel, rank) for plane in planes]
            num_bytes = sum(slot_bytes(planes[plane]) for plane, *_ in cells(held, range(3), range(block_size)))
            assert shape.block_bytes == num_bytes
            sizes = zip(planes, shape.rank_shapes(rank, 5), strict=True)
            assert 5 * num_bytes == sum(math.prod(size) // plane.dim * slot_bytes(plane) for plane, size in sizes)


@settings(deadline=None)
@given(
    sizes,
    st.integers(0, 300),
    st.integers(0, 5000),
    st.integers(1, 40),
    st.sampled_from([16, 32]),
    st.integers(9, 22),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_pieces_are_few_fit_the_frame_and_cover_the_tokens_in_order(
    num_heads, first, num_tokens, num_layers, block_size, log_frame, dtype
):
    frame_bytes = 1 << log_frame
    planes = keys_and_values(num_heads, 8, dtype)
    shape = layout(1, num_heads, num_layers=num_layers, block_size=block_size, planes=planes)
    (link,) = plan_transfer(shape, shape)
    token_bytes = 2 * num_heads * 8 * (4 if dtype == "float32" else 2)
    if token_bytes > frame_bytes:
        with pytest.raises(ValueError, match="one token of one layer"):
            frames_of(link, shape, first, max(1, num_tokens), frame_bytes)
        return
    pieces = frames_of(link, shape, first, num_tokens, frame_bytes)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert all(0 < piece.num_bytes <= frame_bytes for piece in pieces)
    assert sum(piece.num_bytes for piece in pieces) == token_bytes * num_tokens * num_layers
    covered = [(layer, token) for piece in pieces for layer in range(*piece.layers) for token in range(*piece.tokens)]
    if len(covered) < 20_000:
        assert sorted(covered) == list(itertools.product(range(num_layers), range(first, first + num_tokens)))
    units = num_layers * 2 * num_heads * -(-num_tokens // UNIT_TOKENS)
    if num_tokens * token_bytes * num_layers <= frame_bytes and units <= MAX_UNITS:
        assert len(pieces) == min(1, num_tokens)
    elif units <= MAX_UNITS:  # at least half full, but for the layers and tokens left over at the end of each segment
        num_segments = 2 + num_tokens // SEGMENT_TOKENS
        assert len(pieces) <= 2 * (token_bytes * num_tokens * num_layers // frame_bytes + 1) + num_segments * num_layers
    assert all(num_units(piece) <= MAX_UNITS for piece in pieces)
    if token_bytes * UNIT_TOKENS <= frame_bytes:
        cuts = {piece.tokens[0] for piece in pieces} - {first}
        assert not any(cut % UNIT_TOKENS for cut in cuts)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 20), sizes, st.integers(14, 22))
def test_a_large_prompts_pieces_come_segment_by_segment(num_tokens, first_unit, num_heads, log_frame):
    first = first_unit * UNIT_TOKENS
    shape = layout(1, num_heads, num_layers=40)
    (link,) = plan_transfer(shape, shape)
    pieces = frames_of(link, shape, first, num_tokens, 1 << log_frame)
    if len(pieces) == 1:
        return
    computed = list(itertools.accumulate((piece.tokens[1] for piece in pieces), max))
    needed_later = list(itertools.accumulate((piece.tokens[0] for piece in reversed(pieces)), min))[::-1]
    longest = max(SEGMENT_TOKENS, (1 << log_frame) // (2 * num_heads * 8 * 4 * 40))
    assert all(end - start <= longest for end, start in zip(computed, needed_later, strict=True))


def test_a_prompt_of_no_tokens_has_no_pieces():
    shape = layout(2, 4)
    manifest = manifest_of(shape, shape, 32, 0)
    assert (manifest.num_frames, manifest.num_bytes) == (0, 0)


def test_a_large_prompt_is_cut_into_frames_of_about_the_frame_size():
    shape = KVLayout("llama", 32, keys_and_values(8, 128, "bfloat16"), 16, 1)
    manifest = manifest_of(shape, shape, 0, 2048)
    assert manifest.num_bytes == 32 * 2 * 8 * 2048 * 128 * 2
    assert manifest.num_frames == manifest.num_bytes // FRAME_BYTES


@given(sizes, sizes, sizes, st.integers(0, 64), st.integers(0, 100))
def test_the_manifest_adds_up_what_all_destination_ranks_hold(source_tp, destination_tp, num_kv_heads, first, length):
    source, destination = layout(source_tp, num_kv_heads), layout(destination_tp, num_kv_heads)
    held = sum(len(owned_heads(num_kv_heads, destination_tp, rank)) for rank in range(destination_tp))
    assert manifest_of(source, destination, first, length).num_bytes == 3 * 2 * held * length * 8 * 4


def test_local_heads_count_from_the_ranks_own_first_head():
    def local(shape: KVLayout, rank: int, *heads: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return local_heads(shape, rank, Piece(0, (0, 1), tuple(Part(each, 1) for each in heads), (0, 1), 1))

    assert local(layout(2, 8), 1, (5, 7), (4, 8)) == ((1, 3), (0, 4))
    assert local(layout(8, 2), 5, (1, 2), (0, 0)) == ((0, 1), (0, 0))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_layers": 4}, "num_layers differs: 3 and 4"),
        ({"model_hash": "n"}, "model_hash differs: m and n"),
        ({"planes": (Plane(1, 576, "bfloat16"),)}, "differs: 2 x 8 float32 . 2 x 8 float32 and 1 x 576 bfloat16"),
    ],
)
def test_layouts_that_do_not_match_are_refused_by_name(change, name):
    with pytest.raises(ValueError, match=name):
        plan_transfer(layout(1, 2), layout(1, 2, **change))


def test_a_type_that_kv_cannot_have_is_refused_with_those_it_can():
    with pytest.raises(ConfigError, match="KV cannot be kept as float64; choose one of float32, bfloat16, float16"):
        keys_and_values(2, 8, "float64")


def test_block_sizes_may_differ_and_change_nothing_about_what_is_sent():
    for one, other in itertools.permutations([16, 32, 64, 128], 2):
        source, destination = layout(2, 4, block_size=one), layout(4, 4, block_size=other)
        assert plan_transfer(source, destination) == plan_transfer(layout(2, 4), layout(4, 4))
        for link in plan_transfer(source, destination):
            assert frames_of(link, source, 32, 900, 8192) == frames_of(link, destination, 32, 900, 8192)


def test_heads_that_cannot_be_split_over_the_ranks_are_refused():
    with pytest.raises(ValueError, match="6 KV heads cannot be split over 4 ranks"):
        layout(4, 6).rank_heads(0)
    with pytest.raises(ValueError, match="2 KV heads cannot be split over 0 ranks"):
        plan_transfer(layout(0, 2), layout(1, 2))


def test_a_block_table_that_is_too_short_or_names_a_missing_block_is_refused():
    check_table((3, 1, 2), 16, 4, 48)
    with pytest.raises(ValueError, match="3 blocks of 16 slots cannot hold 49 tokens"):
        check_table((3, 1, 2), 16, 4, 49)
    for outside in (4, -1):
        with pytest.raises(ValueError, match=f"block {outside} does not exist"):
            check_table((3, outside, 2), 16, 4, 48)


def test_the_plan_imports_without_torch():
    code = "import sys, kv_transfer.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
