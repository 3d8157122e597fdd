"""Paged attention against the definition, in float64, on odd shapes and shuffled block tables."""

import pytest
import torch

from kernels.plain.attention_decode import attention_decode
from kernels.plain.attention_prefill import attention_prefill
from tests.kernels.paged import make_paged, naive_attention

HEADS = [(1, 1, 8), (4, 2, 24), (6, 3, 64), (7, 1, 80), (2, 2, 256)]  # num_heads, num_kv_heads, head_dim
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_decode_is_attention_over_the_whole_context(num_heads, num_kv_heads, head_dim, block_size, dtype):
    torch.manual_seed(head_dim)
    context_lens = [1, 15, 16, 17, 130]
    paged = make_paged(context_lens, num_kv_heads, head_dim, block_size, dtype)
    q = torch.randn(len(context_lens), num_heads, head_dim).to(dtype)
    out = attention_decode(q, paged.k_cache, paged.v_cache, paged.block_tables, paged.context_lens, head_dim**-0.5)
    assert out.dtype == dtype
    assert out.shape == q.shape
    for index in range(len(context_lens)):
        expected = naive_attention(q[index : index + 1], paged.keys[index], paged.values[index], head_dim**-0.5)
        torch.testing.assert_close(out[index].double(), expected[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_prefill_sees_the_prefix_and_nothing_that_comes_later(num_heads, num_kv_heads, head_dim, block_size, dtype):
    torch.manual_seed(head_dim)
    context_lens, query_lens = [33, 2, 140, 16, 50], [33, 2, 9, 15, 1]
    paged = make_paged(context_lens, num_kv_heads, head_dim, block_size, dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    q = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
    out = attention_prefill(
        q, paged.k_cache, paged.v_cache, paged.block_tables, starts, paged.context_lens, head_dim**-0.5
    )
    assert out.dtype == dtype
    assert out.shape == q.shape
    for index in range(len(context_lens)):
        chunk = slice(starts[index], starts[index + 1])
        expected = naive_attention(q[chunk], paged.keys[index], paged.values[index], head_dim**-0.5)
        torch.testing.assert_close(out[chunk].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_scale_is_the_one_given() -> None:
    paged = make_paged([20], 1, 16, 16, torch.float32)
    q = torch.randn(20, 1, 16)
    starts = torch.tensor([0, 20], dtype=torch.int32)
    out = attention_prefill(q, paged.k_cache, paged.v_cache, paged.block_tables, starts, paged.context_lens, 1.5)
    expected = naive_attention(q, paged.keys[0], paged.values[0], 1.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
