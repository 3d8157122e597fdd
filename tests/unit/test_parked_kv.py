"""What is parked comes back byte for byte, into whatever blocks it gets, and nothing else is written."""

import pytest
import torch

from engine.parked_kv import ParkedKV
from protocol.identity import Attempt
from protocol.orders import Discard, Park, Unpark

SHAPE = (2, 3, 12, 2, 16, 32)  # planes (keys and values), layers, blocks, KV heads, slots, head_dim
OTHER_PLANES = [(1, 64, torch.bfloat16), (4, 3, torch.float16), (1, 192, torch.float32)]  # heads, dim, dtype
ATTEMPT = Attempt("r", 1, 2, 3, 4)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def cache(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(request.param)


def tokens_of(cache: torch.Tensor, block_ids: tuple[int, ...], first: int, end: int) -> torch.Tensor:
    """Return [planes, layers, KV heads, end - first, head_dim], slot by slot."""
    slots = [cache[:, :, block_ids[position // 16], :, position % 16] for position in range(first, end)]
    return torch.stack(slots, dim=3)


@pytest.mark.parametrize("first_position", [0, 16, 32])
@pytest.mark.parametrize("num_tokens", [33, 40, 48])
def test_kv_comes_back_into_other_blocks(cache: torch.Tensor, num_tokens: int, first_position: int) -> None:
    parked, original = ParkedKV(cache.unbind()), cache.clone()
    parked.execute(Park(ATTEMPT, (7, 2, 9), num_tokens))
    for block in (7, 2, 9):
        cache[:, :, block] = 0
    before = cache.clone()
    parked.execute(Unpark(ATTEMPT, (1, 9, 4, 5), first_position))
    found = tokens_of(cache, (1, 9, 4, 5), first_position, num_tokens)
    assert torch.equal(found, tokens_of(original, (7, 2, 9), first_position, num_tokens))
    for position in range(first_position, num_tokens):
        cache[:, :, (1, 9, 4, 5)[position // 16], :, position % 16] = 0
        before[:, :, (1, 9, 4, 5)[position // 16], :, position % 16] = 0
    assert torch.equal(cache, before), "something else was written"
    assert len(parked) == 0


def test_what_is_there_already_is_not_copied_and_what_nobody_wants_is_forgotten(cache: torch.Tensor) -> None:
    parked, original = ParkedKV(cache.unbind()), cache.clone()
    parked.execute(Park(ATTEMPT, (3, 4), 32))
    parked.execute(Unpark(ATTEMPT, (5, 6), 32))
    parked.execute(Park(ATTEMPT, (3, 4), 20))
    assert len(parked) == 1
    parked.execute(Discard(ATTEMPT))
    assert len(parked) == 0
    assert torch.equal(cache, original)


@pytest.mark.parametrize("first_position", [0, 16])
def test_planes_of_other_widths_come_back_too(first_position: int) -> None:
    planes = [torch.randn(2, 6, heads, 16, dim).to(dtype) for heads, dim, dtype in OTHER_PLANES]
    originals = [plane.clone() for plane in planes]
    parked = ParkedKV(planes)
    parked.execute(Park(ATTEMPT, (4, 1, 2), 41))
    for plane in planes:
        plane[:, [4, 2]] = 0
    parked.execute(Unpark(ATTEMPT, (5, 3, 0), first_position))
    for plane, original in zip(planes, originals, strict=True):
        expected = original.clone()
        expected[:, [4, 2]] = 0
        for position in range(first_position, 41):
            block, slot = divmod(position, 16)
            expected[:, (5, 3, 0)[block], :, slot] = original[:, (4, 1, 2)[block], :, slot]
        assert torch.equal(plane, expected)
