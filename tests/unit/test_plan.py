"""The transfer plan against a brute force: every layer, head and token reaches each rank that holds it exactly once."""

import itertools
import subprocess
import sys
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.plan import (
    FRAME_BYTES,
    MAX_UNITS,
    SEGMENT_TOKENS,
    check_table,
    frames_of,
    heads_of_rank,
    local_heads,
    manifest_of,
    num_units,
    plan_transfer,
)
from protocol.layout import UNIT_TOKENS, KVLayout

SIZES = (1, 2, 4, 8)
PAIRS = list(itertools.product(SIZES, SIZES, SIZES))
sizes = st.sampled_from(SIZES)


def layout(tensor_parallel: int, num_kv_heads: int, **changes: object) -> KVLayout:
    plain = KVLayout("m", 3, num_kv_heads, 8, "float32", 16, tensor_parallel)
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
        first, stop = heads_of_rank(layout(tensor_parallel, num_kv_heads), rank)
        assert set(range(first, stop)) == owned_heads(num_kv_heads, tensor_parallel, rank)


@pytest.mark.parametrize(("source_tp", "destination_tp", "num_kv_heads"), PAIRS)
def test_every_layer_head_and_token_reaches_every_destination_rank_exactly_once(
    source_tp, destination_tp, num_kv_heads
):
    source, destination = layout(source_tp, num_kv_heads), layout(destination_tp, num_kv_heads)
    carried: Counter[tuple[int, int, int, int]] = Counter()
    for link in plan_transfer(source, destination):
        assert set(range(*link.heads)) <= owned_heads(num_kv_heads, source_tp, link.source_rank)
        for piece in frames_of(link, source, first_position=16, num_tokens=37, frame_bytes=1024):
            assert piece.heads == link.heads
            cells = itertools.product(*(range(*span) for span in (piece.layers, piece.heads, piece.tokens)))
            carried.update((link.destination_rank, *cell) for cell in cells)
    wanted = {
        (rank, layer, head, token)
        for rank in range(destination_tp)
        for layer, head, token in itertools.product(
            range(3), owned_heads(num_kv_heads, destination_tp, rank), range(16, 53)
        )
    }
    assert carried == Counter(wanted)


@pytest.mark.parametrize(("source_tp", "destination_tp", "num_kv_heads"), PAIRS)
def test_those_that_want_a_head_are_dealt_out_evenly_over_those_that_hold_it(source_tp, destination_tp, num_kv_heads):
    links = plan_transfer(layout(source_tp, num_kv_heads), layout(destination_tp, num_kv_heads))
    assert len({(link.source_rank, link.destination_rank) for link in links}) == len(links)
    for head in range(num_kv_heads):
        holders = [rank for rank in range(source_tp) if head in owned_heads(num_kv_heads, source_tp, rank)]
        sent = Counter(link.source_rank for link in links if link.heads[0] <= head < link.heads[1])
        loads = [sent[rank] for rank in holders]
        assert max(loads) - min(loads) <= 1


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
    shape = layout(1, num_heads, num_layers=num_layers, block_size=block_size, dtype=dtype)
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
    shape = KVLayout("llama", 32, 8, 128, "bfloat16", 16, 1)
    manifest = manifest_of(shape, shape, 0, 2048)
    assert manifest.num_bytes == 32 * 2 * 8 * 2048 * 128 * 2
    assert manifest.num_frames == manifest.num_bytes // FRAME_BYTES


@given(sizes, sizes, sizes, st.integers(0, 64), st.integers(0, 100))
def test_the_manifest_adds_up_what_all_destination_ranks_hold(source_tp, destination_tp, num_kv_heads, first, length):
    source, destination = layout(source_tp, num_kv_heads), layout(destination_tp, num_kv_heads)
    held = sum(len(owned_heads(num_kv_heads, destination_tp, rank)) for rank in range(destination_tp))
    assert manifest_of(source, destination, first, length).num_bytes == 3 * 2 * held * length * 8 * 4


def test_local_heads_count_from_the_ranks_own_first_head():
    assert local_heads(layout(2, 8), 1, (5, 7)) == (1, 3)
    assert local_heads(layout(8, 2), 5, (1, 2)) == (0, 1)


@pytest.mark.parametrize("change", [{"num_layers": 4}, {"dtype": "bfloat16"}, {"model_hash": "n"}, {"head_dim": 16}])
def test_layouts_that_do_not_match_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        plan_transfer(layout(1, 2), layout(1, 2, **change))


def test_block_sizes_may_differ_and_change_nothing_about_what_is_sent():
    for one, other in itertools.permutations([16, 32, 64, 128], 2):
        source, destination = layout(2, 4, block_size=one), layout(4, 4, block_size=other)
        assert plan_transfer(source, destination) == plan_transfer(layout(2, 4), layout(4, 4))
        for link in plan_transfer(source, destination):
            assert frames_of(link, source, 32, 900, 8192) == frames_of(link, destination, 32, 900, 8192)


def test_heads_that_cannot_be_split_over_the_ranks_are_refused():
    with pytest.raises(ValueError, match="6 KV heads cannot be split over 4 ranks"):
        heads_of_rank(layout(4, 6), 0)
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
