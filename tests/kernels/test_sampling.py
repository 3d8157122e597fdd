"""Philox against published vectors; penalties and filters against their definitions written out row by row."""

import math

import pytest
import torch

from kernels.plain.penalize import penalize
from kernels.plain.philox import philox_4x32
from kernels.plain.sample import sample

# From kat_vectors of Random123, the authors' own implementation: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_numbers(counter, key, expected):
    counters = tuple(torch.tensor([word]) for word in words(counter))
    keys = tuple(torch.tensor([word]) for word in words(key))
    assert philox_4x32(counters, keys).tolist() == [words(expected)]


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """The same ten rounds on Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second % 2**32, (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("seed", [0, 1234, -1, 0x0123456789ABCDEF])
def test_a_draw_is_the_one_that_its_seed_position_and_logits_define(seed):
    """Workers of two releases must agree, or a replayed stream would change its text midway."""
    torch.manual_seed(seed % 1000)
    logits = torch.randn(30, 41)
    positions = torch.arange(30) * 3_000_000_000  # beyond 32 bits
    ones = torch.ones(30)
    drawn = sample(logits, ones * 0.5, positions * 0, ones, ones * 0, torch.full((30,), seed), positions)
    for row in range(30):
        position = int(positions[row])
        scores = []
        for token in range(41):
            counter = [token // 4, position % 2**32, position >> 32, 0]
            word = python_philox(counter, [seed % 2**32, (seed >> 32) % 2**32])[token % 4]
            scores.append(logits[row, token].item() / 0.5 - math.log(-math.log1p(-(word + 0.5) / 2**32)))
        assert drawn[row] == scores.index(max(scores))


def test_penalties_are_those_of_their_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 11)
    original = logits.clone()
    held = {(0, 2): 0, (0, 5): 3, (1, 0): 1, (1, 10): 0, (2, 7): 9}  # text and token: how often its output holds it
    in_output, in_prompt = torch.zeros(3, 11, dtype=torch.int32), torch.zeros(3, 11, dtype=torch.bool)
    for place, count in held.items():
        in_output[place], in_prompt[place] = count, count == 0
    text_of = {3: 0, 0: 1, 2: 2}  # by row; row 1 is not penalized
    repetition, frequency, presence = [1.3, 0.7, 1.0], [0.5, -0.25, 0.0], [0.1, 1.5, -2.0]
    rows, texts = torch.tensor(list(text_of)), torch.tensor(list(text_of.values()))
    factors = (torch.tensor(factor) for factor in (repetition, frequency, presence))
    penalize(logits, rows, texts, in_output, in_prompt, *factors)
    for row in range(4):
        for token in range(11):
            expected = original[row, token].item()
            text = text_of.get(row)
            if (text, token) in held:
                count = held[text, token]
                expected = expected / repetition[text] if expected > 0 else expected * repetition[text]
                expected -= frequency[text] * count + presence[text] * (count > 0)
            assert logits[row, token].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def naive_kept(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be drawn. Applies min-p and top-k, then top-p to what they leave."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    order = [token for token in order if weights[token] >= min_p][: top_k or None]
    total, before, kept = sum(weights[token] for token in order), 0.0, set()
    for token in order:
        if before < top_p * total:
            kept.add(token)
        before += weights[token]
    return kept


@pytest.mark.parametrize("vocab_size", [5, 67, 1500])
def test_only_kept_tokens_are_drawn_and_each_of_them_can_be(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    for trial in range(12):  # every combination of the three below
        logits = torch.randn(vocab_size, generator=generator) * 2
        temperature, top_p = 0.4 + trial / 6, (1.0, 0.8, 0.3, 0.999)[trial % 4]
        top_k, min_p = (0, 4, 1000)[trial % 3], (0.0, 0.05)[trial % 2]
        kept = naive_kept(logits.double().tolist(), temperature, top_k, top_p, min_p)
        drawn = draw_many(logits, 1000, temperature, top_k, top_p, min_p)
        assert set(drawn.tolist()) <= kept
        if len(kept) <= 4 and min_p:  # each is likely enough to come up in 1000 draws
            assert set(drawn.tolist()) == kept


def draw_many(logits: torch.Tensor, num_draws: int, temperature: float, top_k: int, top_p: float, min_p: float):
    """Draw with as many different seeds, in batches."""
    drawn = []
    for seeds in torch.arange(num_draws).split(500):
        ones = torch.ones(len(seeds))
        top_ks = torch.full((len(seeds),), min(top_k, len(logits)))
        rows = logits.expand(len(seeds), -1)
        drawn.append(sample(rows, ones * temperature, top_ks, ones * top_p, ones * min_p, seeds, seeds * 0))
    return torch.cat(drawn)


def test_top_p_beyond_the_first_candidates_is_exact() -> None:
    """A flat distribution over a large vocabulary needs more candidates than are looked at first."""
    logits = torch.linspace(0, 0.001, 6000)
    drawn = draw_many(logits, 500, 1.0, 0, 0.5, 0.0)
    assert 2990 <= drawn.min() < 3100
    assert drawn.unique().numel() > 400


@pytest.mark.parametrize("top_p", [1e-12, 1e-13, 1e-38])
def test_the_smallest_top_p_still_leaves_the_likeliest_token(top_p: float) -> None:
    drawn = draw_many(torch.tensor([0.0, 1.0, 5.0, 2.0]), 100, temperature=1.0, top_k=0, top_p=top_p, min_p=0.0)
    assert set(drawn.tolist()) == {2}


def test_a_row_without_top_p_keeps_every_token_beside_rows_with_it() -> None:
    logits, num_rows = torch.zeros(400, 6000), 400
    top_p = torch.tensor([1.0, 0.01]).repeat(num_rows // 2)
    ones, zeros, seeds = torch.ones(num_rows), torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows)
    beside = sample(logits + torch.linspace(0.001, 0, 6000), ones, zeros, top_p, ones * 0, seeds, zeros)
    assert beside[1::2].max() < 100
    assert beside[::2].max() > 5800


def test_a_temperature_near_zero_is_greedy_and_finite() -> None:
    logits = torch.tensor([1.0, 1.001, -5.0])
    assert draw_many(logits, 200, 1e-6, 0, 1.0, 0.0).tolist() == [1] * 200


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert set(draw_many(logits, 200, 2.0, 0, 0.99, 0.0).tolist()) == {1, 3}
