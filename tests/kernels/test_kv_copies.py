"""gather_kv and scatter_kv against slot-by-slot loops, with partial blocks at both ends and tables in any order."""

import pytest
import torch

from kernels.plain.gather_kv import block_spans, gather_kv
from kernels.plain.scatter_kv import scatter_kv

NUM_LAYERS, NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 3, 12, 4, 16, 8

CASES = [(0, 1), (0, 16), (0, 37), (5, 9), (5, 16), (5, 40), (16, 64), (31, 33), (47, 80), (79, 80), (0, 80)]


def random_cache(dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_LAYERS, 2, NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    return torch.randn(shape, generator=generator).to(dtype)


def slot_by_slot(cache, table, layers, heads, tokens) -> torch.Tensor:
    columns = [
        cache[layers[0] : layers[1], :, table[position // BLOCK_SIZE], heads[0] : heads[1], position % BLOCK_SIZE]
        for position in range(*tokens)
    ]
    return torch.stack(columns, dim=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", [[7, 2, 9, 0, 11], [3, 4, 5, 6, 7], [5, 6, 2, 3, 1], [11, 10, 9, 8, 7]])
@pytest.mark.parametrize("tokens", CASES)
def test_gather_and_scatter_move_exactly_the_named_slots(dtype, table, tokens):
    for layers, heads in (((0, 3), (0, 4)), ((1, 2), (1, 3)), ((1, 3), (3, 4))):
        source, target = random_cache(dtype, 1), random_cache(dtype, 2)
        block_table = torch.tensor(table)
        payload = gather_kv(source, block_table, layers, heads, tokens)
        assert payload.is_contiguous()
        assert torch.equal(payload, slot_by_slot(source, table, layers, heads, tokens))
        room = torch.empty(payload.numel(), dtype=dtype)
        assert gather_kv(source, block_table, layers, heads, tokens, room).data_ptr() == room.data_ptr()
        assert torch.equal(room, payload.flatten())

        other = torch.tensor(table[::-1])
        expected = target.clone()
        for index, position in enumerate(range(*tokens)):
            block, slot = other[position // BLOCK_SIZE], position % BLOCK_SIZE
            expected[layers[0] : layers[1], :, block, heads[0] : heads[1], slot] = payload[:, :, :, index]
        from_bytes = target.clone()
        scatter_kv(payload, target, other, layers, heads, tokens)
        assert torch.equal(target, expected)
        scatter_kv(payload.flatten().view(torch.uint8), from_bytes, other, layers, heads, tokens)
        assert torch.equal(from_bytes, expected)


@pytest.mark.parametrize("tokens", [*CASES, (4, 4)])
def test_spans_cover_the_positions_in_order_and_are_at_most_three(tokens):
    spans = list(block_spans(tokens, BLOCK_SIZE))
    positions = [
        block * BLOCK_SIZE + slot for blocks, slots, _ in spans for block in range(*blocks) for slot in range(*slots)
    ]
    assert positions == list(range(*tokens))
    assert [index for _, _, part in spans for index in range(*part)] == list(range(tokens[1] - tokens[0]))
    assert len(spans) <= 3
