"""gather_kv and scatter_kv against slot-by-slot loops, with partial blocks at both ends and tables in any order."""

import pytest
import torch

from kernels.plain.gather_kv import block_spans, gather_kv
from kernels.plain.scatter_kv import scatter_kv

NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, F32 = 3, 12, 16, torch.float32

CASES = [(0, 1), (0, 16), (0, 37), (5, 9), (5, 16), (5, 40), (16, 64), (31, 33), (47, 80), (79, 80), (0, 80)]


PLANES = {
    "keys and values": [(4, 8, torch.bfloat16), (4, 8, torch.bfloat16)],
    "one plane": [(1, 24, torch.float32)],
    "of other widths and types": [(1, 64, torch.bfloat16), (1, 192, torch.bfloat16), (4, 3, torch.int8), (4, 1, F32)],
}
HEADS = {1: [(0, 1), (0, 0)], 4: [(0, 4), (1, 3)]}
"""Of a plane with so many heads: those that are copied."""


def random_cache(planes: list[tuple[int, int, torch.dtype]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(NUM_LAYERS, NUM_BLOCKS, heads, BLOCK_SIZE, dim, generator=generator) * 50).to(dtype)
        for heads, dim, dtype in planes
    ]


def slot_by_slot(planes, table, layers, heads, tokens) -> torch.Tensor:
    """Return the payload, copied one slot of one head at a time."""
    slots = [
        plane[layer, table[position // BLOCK_SIZE], head, position % BLOCK_SIZE].view(torch.uint8)
        for plane, span in zip(planes, heads, strict=True)
        for layer in range(*layers)
        for head in range(*span)
        for position in range(*tokens)
    ]
    return torch.cat(slots)


@pytest.mark.parametrize("kind", PLANES)
@pytest.mark.parametrize("table", [[7, 2, 9, 0, 11], [3, 4, 5, 6, 7], [5, 6, 2, 3, 1], [11, 10, 9, 8, 7]])
@pytest.mark.parametrize("tokens", CASES)
def test_gather_and_scatter_move_exactly_the_named_slots(kind, table, tokens):
    source, original = random_cache(PLANES[kind], 1), random_cache(PLANES[kind], 2)
    for layers, index in (((0, 3), 0), ((1, 2), 1 if len(source) > 1 else 0)):
        heads = [HEADS[num_heads][index] for num_heads, _, _ in PLANES[kind]]
        area, other = (layers, heads, tokens), table[::-1]
        payload = gather_kv(source, torch.tensor(table), *area)
        assert torch.equal(payload, slot_by_slot(source, table, *area))
        room = torch.zeros(payload.nbytes + 1, dtype=torch.uint8)[1:]
        assert gather_kv(source, torch.tensor(table), *area, room) is room
        assert torch.equal(room, payload)

        target = [plane.clone() for plane in original]
        scatter_kv(payload, target, torch.tensor(other), *area)
        assert torch.equal(slot_by_slot(target, other, *area), payload)
        back = slot_by_slot(original, other, *area)
        scatter_kv(back, target, torch.tensor(other), *area)
        assert all(map(torch.equal, target, original)), "something else was written"


@pytest.mark.parametrize("tokens", [*CASES, (4, 4)])
def test_spans_cover_the_positions_in_order_and_are_at_most_three(tokens):
    spans = list(block_spans(tokens, BLOCK_SIZE))
    positions = [
        block * BLOCK_SIZE + slot for blocks, slots, _ in spans for block in range(*blocks) for slot in range(*slots)
    ]
    assert positions == list(range(*tokens))
    assert [index for _, _, part in spans for index in range(*part)] == list(range(tokens[1] - tokens[0]))
    assert len(spans) <= 3
