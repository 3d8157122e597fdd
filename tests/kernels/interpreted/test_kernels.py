"""Every Triton kernel, interpreted, against its plain twin: odd shapes, shuffled blocks, empty rows, long contexts.

The interpreter multiplies matrices of bfloat16 as if they were integers, and rounds to bfloat16 by cutting off. Where
this would show, float16 stands in, which takes the same path through the kernels.
"""

import functools
import math

import numpy as np
import pytest
import torch

from kernels.backend import _operations_in
from kernels.triton import attention_decode, attention_prefill
from tests.kernels import twins

TRITON, PLAIN = _operations_in("kernels.triton"), _operations_in("kernels.plain")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

SHAPES = [  # (query heads, KV heads), head_dim, block_size, dtype
    ((8, 2), 64, 16, F32),
    ((4, 1), 128, 128, F16),
    ((3, 3), 80, 32, F32),
    ((7, 1), 96, 48, F16),
    ((20, 1), 64, 16, F16),
    ((2, 1), 256, 16, F32),
    ((6, 2), 128, 64, F32),
    ((4, 2), 80, 16, F16),
    ((2, 2), 96, 32, F32),
    ((4, 4), 256, 64, F16),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "dtype"), SHAPES)
def test_decode_attention(heads, head_dim, block_size, dtype, num_splits, monkeypatch):
    monkeypatch.setattr(attention_decode, "choose_splits", lambda rows, context, tile, programs: (num_splits, tile))
    twins.check_decode(TRITON, [1, 15, 0, 17, 130, 257], heads, head_dim, block_size, dtype, "cpu")


def test_decode_attention_over_a_long_context_beside_short_ones() -> None:
    twins.check_decode(TRITON, [5, 5000, 0, 64], (4, 1), 64, 16, F16, "cpu")


@pytest.mark.parametrize(("heads", "head_dim", "block_size", "dtype"), SHAPES)
def test_prefill_attention(heads, head_dim, block_size, dtype):
    contexts, queries = [33, 2, 140, 16, 50, 9], [33, 2, 9, 15, 0, 1]
    twins.check_prefill(TRITON, contexts, queries, heads, head_dim, block_size, dtype, "cpu")


def test_prefill_attention_over_a_long_prefix() -> None:
    twins.check_prefill(TRITON, [2000, 300], [70, 300], (4, 1), 64, 16, F16, "cpu")


@pytest.mark.parametrize("tokens", [1, 4, 32])
@pytest.mark.parametrize("num_sequences", [1, 6, 70])
def test_prefill_takes_every_tile_once_and_those_that_see_most_first(num_sequences, tokens):
    query_lens = torch.randint(0, 90, (num_sequences,))
    prefix_lens = torch.randint(0, 200, (num_sequences,))
    starts = torch.cat((torch.zeros(1), query_lens.cumsum(0))).int()
    total = int(query_lens.sum())
    tiles = attention_prefill._plan_tiles(starts, (prefix_lens + query_lens).int(), total, tokens).tolist()
    expected = [[index, first] for index, n in enumerate(query_lens.tolist()) for first in range(0, n, tokens)]
    used, unused = tiles[: len(expected)], tiles[len(expected) :]
    assert sorted(used) == expected
    assert unused == [[-1, -1]] * len(unused)
    seen = [int(prefix_lens[s] + min(first + tokens, query_lens[s])) for s, first in used]
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("num_rows", "size"), [(5, 33), (3, 200), (2, 5120), (1, 12288), (17, 64)])
def test_norms(num_rows, size, dtype):
    twins.check_norms(TRITON, PLAIN, num_rows, size, dtype, "cpu")


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_norms_of_heads_in_place(head_dim):
    twins.check_norm_of_heads(TRITON, PLAIN, 5, head_dim, BF16, "cpu")


@pytest.mark.parametrize("shape", [(3, 14), (2, 3, 96), (1, 5000)])
def test_gate(shape):
    twins.check_gate(TRITON, PLAIN, shape, BF16, "cpu")


@pytest.mark.parametrize(("heads", "head_dim", "block_size", "dtype"), SHAPES)
def test_rope_and_cache_write(heads, head_dim, block_size, dtype):
    twins.check_rope(TRITON, PLAIN, 5, heads, head_dim, block_size, dtype, "cpu")


@pytest.mark.parametrize("tokens", [(0, 1), (5, 40), (16, 64), (31, 33), (0, 80), (7, 7)])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_kv_copies(head_dim, tokens):
    planes = twins.keys_and_values(4, head_dim, BF16)
    for layers, heads in (((0, 3), (0, 4)), ((1, 2), (1, 3))):
        twins.check_kv_copies(TRITON, PLAIN, (3, 5, 16), planes, (layers, [heads, heads], tokens), "cpu")


def test_kv_copies_of_planes_of_other_widths():
    for planes, heads in twins.OTHER_PLANES:
        twins.check_kv_copies(TRITON, PLAIN, (3, 5, 16), planes, ((1, 3), heads, (5, 40)), "cpu")


@pytest.mark.parametrize(
    ("num_rows", "row_words", "unit_words"), [(3, 2048, 1024), (5, 700, 512), (2, 24, 64), (1, 1, 16), (3, 1300, 600)]
)
def test_digests(num_rows, row_words, unit_words):
    twins.check_digests(TRITON, PLAIN, num_rows, row_words, unit_words, "cpu")


@pytest.mark.parametrize("num_penalized", [1, 9])
def test_penalties(num_penalized):
    twins.check_penalties(TRITON, PLAIN, 9, 1057, num_penalized, "cpu")


@pytest.mark.parametrize("vocab_size", [5, 67, 5000])
def test_draws(vocab_size):
    twins.check_draws(TRITON, PLAIN, 36, vocab_size, "cpu")


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    """As in the plain twin: a flat row has no order, so top-k keeps all of it and top-p does too."""
    logits, ones = torch.zeros(40, 4), torch.ones(40)
    seeds, zeros = torch.arange(40), torch.zeros(40, dtype=torch.int64)
    draw = functools.partial(TRITON.sample, logits, ones, min_p=ones * 0, seeds=seeds, positions=zeros)
    assert draw(top_k=zeros + 2, top_p=ones).unique().numel() == 4
    assert draw(top_k=zeros, top_p=ones * 0.3).unique().numel() == 4


def test_a_row_of_nothing_finite_gives_a_token_of_the_vocabulary() -> None:
    """It means nothing, but whoever looks it up must not fall off the end."""
    logits = torch.randn(3, 50)
    logits[0], logits[1, 7], logits[2, 7] = -math.inf, math.nan, math.inf
    ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    with np.errstate(invalid="ignore"):
        drawn = TRITON.sample(logits, ones, zeros + 5, ones * 0.9, ones * 0, zeros, zeros)
    assert drawn.min() >= 0
    assert drawn.max() < 50


def test_nothing_to_do_is_done() -> None:
    twins.check_prefill(TRITON, [9], [9], (1, 1), 64, 16, F32, "cpu")
    assert TRITON.silu_mul(torch.empty(0, 8)).shape == (0, 4)
    assert TRITON.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
