"""Norms, gate and rotary embedding against their definitions in float64."""

import math

import pytest
import torch

from kernels.plain.rms_norm import add_rms_norm, rms_norm
from kernels.plain.rope_and_write_kv import rope_and_write_kv
from kernels.plain.silu_mul import silu_mul


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1, 1), (5, 96), (3, 7, 80), (2, 4097)])
def test_rms_norm_normalises_the_last_dimension(shape):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    out = rms_norm(x, weight, 1e-5).double()
    torch.testing.assert_close(out, naive_rms_norm(x, weight, 1e-5), atol=1e-5, rtol=1e-5)


def test_rms_norm_of_bfloat16_takes_its_mean_in_float32() -> None:
    x, weight = torch.randn(4, 4096).bfloat16(), torch.ones(4096).bfloat16()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), naive_rms_norm(x, weight, 1e-6), atol=0, rtol=2**-8)


def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum() -> None:
    x, residual, weight = torch.randn(5, 96), torch.randn(5, 96), torch.randn(96)
    kept = residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(total, x + kept)
    torch.testing.assert_close(normed.double(), naive_rms_norm(x + kept, weight, 1e-6), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 33, 192])
def test_silu_mul_gates_the_second_half_by_the_first(size):
    x = torch.randn(7, 2 * size)
    gate, up = x[:, :size].double(), x[:, size:].double()
    torch.testing.assert_close(silu_mul(x).double(), gate / (1 + (-gate).exp()) * up, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 24), (3, 1, 64), (2, 2, 2)])
def test_rope_turns_queries_and_keys_and_writes_only_the_given_slots(num_heads, num_kv_heads, head_dim):
    num_tokens, block_size = 9, 16
    q, k, v = (torch.randn(num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads))
    positions = torch.randint(0, 500, (num_tokens,))
    frequencies = torch.rand(head_dim // 2, dtype=torch.float64)
    angles = positions.double()[:, None] * frequencies
    slots = torch.randperm(5 * block_size)[:num_tokens]
    k_cache, v_cache = torch.full((2, 5, num_kv_heads, block_size, head_dim), 7.0)
    rotated = rope_and_write_kv(q, k, v, angles.cos().float(), angles.sin().float(), slots, k_cache, v_cache)
    is_written = torch.zeros(5, block_size, dtype=torch.bool)
    for token, slot in enumerate(slots.tolist()):
        place = (slot // block_size, slice(None), slot % block_size)
        is_written[slot // block_size, slot % block_size] = True
        torch.testing.assert_close(rotated[token], naive_rotation(q[token], angles[token]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(k_cache[place], naive_rotation(k[token], angles[token]), atol=1e-5, rtol=1e-5)
        assert torch.equal(v_cache[place], v[token])
    for cache in (k_cache, v_cache):
        assert bool((cache.transpose(1, 2)[~is_written] == 7.0).all())


def naive_rotation(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Each pair (i, i + head_dim / 2) is a complex number that turns by angles[i]."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for head in range(x.shape[0]):
        for i in range(half):
            turned = complex(x[head, i], x[head, i + half]) * complex(math.cos(angles[i]), math.sin(angles[i]))
            out[head, i], out[head, i + half] = turned.real, turned.imag
    return out
