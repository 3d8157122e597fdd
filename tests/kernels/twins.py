"""Triton kernels against their plain twins in float64: inputs of every kind, and how far two results may differ.

Used on the CPU, where kernels are interpreted, and on a GPU, at full size. Outputs are poisoned before every run.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kernels.backend import Operations
from kernels.plain.attention_decode import attention_decode as plain_decode
from kernels.plain.attention_prefill import attention_prefill as plain_prefill
from kernels.plain.digest_kv import START, digest_keys

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative norm of the difference to float64: some roundings of each type."""


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let every fresh tensor hold NaN, or the largest integer, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with its fill_uninitialized_memory, on by default
    try:
        assert torch.empty(1).isnan().item()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare by relative norm; NaN never passes."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error.item() < LIMITS[actual.dtype], f"differs by {error:.2e} in relative norm"


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def paged_kv(
    context_lens: list[int], num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return k_cache, v_cache, block_tables and context_lens: blocks shuffled, NaN wherever no context reaches."""
    needed = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(needed) + 3
    free = iter((torch.randperm(num_blocks - 1) + 1).tolist())
    tables = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int32)  # filled up with block 0, which is all NaN
    is_used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for row, length in enumerate(context_lens):
        blocks = torch.tensor(list(itertools.islice(free, needed[row])), dtype=torch.int64)
        tables[row, : needed[row]] = blocks
        is_used[blocks] = (torch.arange(needed[row] * block_size) < length).view(-1, block_size)
    caches = [random(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype, device=device) for _ in range(2)]
    for cache in caches:
        cache.transpose(1, 2)[~is_used.to(device)] = math.nan
    return *caches, tables.to(device), torch.tensor(context_lens, dtype=torch.int32, device=device)


def check_decode(
    operations: Operations,
    context_lens: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """A context of 0 tokens gives zeros; queries lie in a wider row, as the decoder's do."""
    num_heads, num_kv_heads = heads
    k, v, tables, lens = paged_kv(context_lens, num_kv_heads, head_dim, block_size, dtype, device)
    q = random(len(context_lens), num_heads + 2, head_dim, dtype=dtype, device=device)[:, :num_heads]
    scale = 1.3 * head_dim**-0.5
    with poisoned_memory():
        out = operations.attention_decode(q, k, v, tables, lens, scale)
    is_real = lens > 0
    expected = plain_decode(
        q[is_real].double(), k.double(), v.double(), tables[is_real].contiguous(), lens[is_real], scale
    )
    assert out.dtype == dtype
    assert_close(out[is_real], expected)
    assert bool((out[~is_real] == 0).all())


def check_prefill(
    operations: Operations,
    context_lens: list[int],
    query_lens: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Some of query_lens may be 0; queries lie in a wider row, as the decoder's do."""
    num_heads, num_kv_heads = heads
    k, v, tables, lens = paged_kv(context_lens, num_kv_heads, head_dim, block_size, dtype, device)
    q = random(sum(query_lens), num_heads + 2, head_dim, dtype=dtype, device=device)[:, :num_heads]
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(device)
    scale = 1.3 * head_dim**-0.5
    with poisoned_memory():
        out = operations.attention_prefill(q, k, v, tables, starts, lens, scale)
    is_chunk = starts.diff() > 0  # the plain twin takes no empty ones
    starts = torch.cat((starts[:1], starts[1:][is_chunk]))
    expected = plain_prefill(
        q.double().contiguous(), k.double(), v.double(), tables[is_chunk], starts, lens[is_chunk], scale
    )
    assert out.dtype == dtype
    assert_close(out, expected)


def check_norms(operations: Operations, plain: Operations, num_rows: int, size: int, dtype: torch.dtype, device: str):
    x, residual = random(2, num_rows, size, dtype=dtype, device=device) * 3
    weight = random(size, dtype=dtype, device=device)
    kept = residual.clone()
    with poisoned_memory():
        alone = operations.rms_norm(x, weight, 1e-5)
        normed, total = operations.add_rms_norm(x, residual, weight, 1e-5)
    assert_close(alone, plain.rms_norm(x.double(), weight.double(), 1e-5))
    assert torch.equal(total, x + kept)
    assert_close(normed, plain.rms_norm(total.double(), weight.double(), 1e-5))


def check_norm_of_heads(
    operations: Operations, plain: Operations, num_tokens: int, head_dim: int, dtype: torch.dtype, device: str
):
    """Of queries and keys as they are cut from one wider row."""
    heads = random(num_tokens, 7, head_dim, dtype=dtype, device=device)
    weight = random(head_dim, dtype=dtype, device=device)
    for part in heads.split([4, 2, 1], dim=1):
        with poisoned_memory():
            out = operations.rms_norm(part, weight, 1e-6)
        assert_close(out, plain.rms_norm(part.double(), weight.double(), 1e-6))


def check_gate(
    operations: Operations, plain: Operations, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = random(*shape, dtype=dtype, device=device) * 3
    with poisoned_memory():
        out = operations.silu_mul(x)
    assert_close(out, plain.silu_mul(x.double()))


def check_rope(
    operations: Operations,
    plain: Operations,
    num_tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Slots that no token names keep what they hold, NaN too."""
    num_heads, num_kv_heads = heads
    qkv = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = torch.rand(num_tokens, head_dim // 2, device=device) * 100
    num_blocks = num_tokens // block_size + 3
    slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(device)
    caches = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype, device=device)
    wide = caches.double()
    with poisoned_memory():
        out = operations.rope_and_write_kv(q, k, v, angles.cos(), angles.sin(), slots, *caches)
    expected = plain.rope_and_write_kv(
        q.double(), k.double(), v.double(), angles.cos().double(), angles.sin().double(), slots, *wide
    )
    assert_close(out, expected)
    is_written = ~wide.isnan()
    assert torch.equal(~caches.isnan(), is_written)
    assert_close(caches[is_written], wide[is_written])


OTHER_PLANES = [
    ([(1, 576, torch.bfloat16)], [(0, 1)]),
    ([(1, 64, torch.bfloat16), (1, 192, torch.bfloat16)], [(0, 1), (0, 1)]),
    ([(4, 64, torch.bfloat16), (1, 192, torch.float32)], [(1, 3), (0, 0)]),
    ([(4, 16, torch.int32)] * 2 + [(4, 1, torch.float32)] * 2, [(1, 4)] * 4),
    ([(2, 128, torch.bfloat16), (1, 1, torch.float32), (4, 6, torch.float16)], [(0, 0), (0, 1), (2, 3)]),
]
"""Heads, dim and dtype of each plane of a cache, and the heads of each that are copied."""


def check_kv_copies(
    operations: Operations,
    plain: Operations,
    sizes: tuple[int, int, int],
    planes: list[tuple[int, int, torch.dtype]],
    ranges: tuple[tuple[int, int], list[tuple[int, int]], tuple[int, int]],
    device: str,
) -> None:
    """sizes: layers, blocks, block size; planes: heads, dim, dtype of each; ranges: layers, heads of each, tokens."""
    num_layers, num_blocks, block_size = sizes
    source, target, expected, from_elements = (
        [
            random(num_layers, num_blocks, heads, block_size, dim, dtype=dtype, device=device)
            for heads, dim, dtype in planes
        ]
        for _ in range(4)
    )
    for plane, *others in zip(target, expected, from_elements, strict=True):
        for other in others:
            other.copy_(plane)
    sending, receiving = (torch.randperm(num_blocks).to(device) for _ in range(2))
    with poisoned_memory():
        payload = operations.gather_kv(source, sending, *ranges)
    assert payload.dtype == torch.uint8
    assert torch.equal(payload, plain.gather_kv(source, sending, *ranges))
    room = torch.zeros(payload.nbytes, dtype=torch.uint8, device=device).view(planes[0][2])
    assert operations.gather_kv(source, sending, *ranges, room) is room
    assert torch.equal(room.view(torch.uint8), payload)
    plain.scatter_kv(payload, expected, receiving, *ranges)
    operations.scatter_kv(payload, target, receiving, *ranges)
    operations.scatter_kv(room, from_elements, receiving, *ranges)
    for found in (target, from_elements):
        assert all(torch.equal(plane, wanted) for plane, wanted in zip(found, expected, strict=True))


def keys_and_values(num_heads: int, head_dim: int, dtype: torch.dtype) -> list[tuple[int, int, torch.dtype]]:
    """Planes for check_kv_copies."""
    return [(num_heads, head_dim, dtype)] * 2


def check_digests(
    operations: Operations, plain: Operations, num_rows: int, row_words: int, unit_words: int, device: str
) -> None:
    """To the last bit, and against sums in Python for the first and the last unit."""
    payload = torch.randint(0, 256, (num_rows * row_words * 4,), dtype=torch.uint8, device=device)
    with poisoned_memory():
        digests = operations.digest_kv(payload, row_words * 4, unit_words * 4)
    assert torch.equal(digests, plain.digest_kv(payload, row_words * 4, unit_words * 4))
    words = payload.view(torch.int32).view(num_rows, row_words).cpu().numpy().astype(np.uint32)
    keys = digest_keys(unit_words, torch.device("cpu")).tolist()
    last = (row_words - 1) // unit_words * unit_words
    for unit, found in ((words[0, :unit_words], digests[0]), (words[-1, last:], digests[-1])):
        total = START + sum(word * key for word, key in zip(unit.tolist(), keys, strict=False))
        assert int(found) % 2**64 == total % 2**64


def check_penalties(
    operations: Operations, plain: Operations, num_rows: int, vocab_size: int, num_penalized: int, device: str
) -> None:
    """To the last bit: a rounding more could change a token."""
    logits = random(num_rows, vocab_size, dtype=torch.float32, device=device) * 5
    rows = torch.randperm(num_rows)[:num_penalized].to(device)
    texts = torch.randperm(num_rows + 3)[:num_penalized].to(device)
    in_output = torch.randint(-9, 5, (num_rows + 3, vocab_size), device=device, dtype=torch.int32).clamp(min=0)
    in_prompt = torch.rand(num_rows + 3, vocab_size, device=device) < 0.3
    factors = (torch.rand(3, num_penalized, device=device) + 0.3).unbind()
    expected = logits.clone()
    plain.penalize(expected, rows, texts, in_output, in_prompt, *factors)
    operations.penalize(logits, rows, texts, in_output, in_prompt, *factors)
    assert torch.equal(logits, expected)


def check_draws(operations: Operations, plain: Operations, num_rows: int, vocab_size: int, device: str) -> None:
    """Every combination of filters among the rows; seeds and positions use all their bits."""
    logits = random(num_rows, vocab_size, dtype=torch.float32, device=device) * 3
    logits[:, vocab_size // 2] = -math.inf
    combinations = itertools.cycle(itertools.product((0, 1, 40), (1.0, 0.95, 0.4, 1e-13), (0.0, 0.02)))
    top_k, top_p, min_p = zip(*itertools.islice(combinations, num_rows), strict=True)
    arguments = (
        torch.rand(num_rows, device=device) + 0.3,
        torch.tensor(top_k, device=device).clamp(max=vocab_size),
        torch.tensor(top_p, device=device),
        torch.tensor(min_p, device=device),
        torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device),
        torch.randint(0, 2**40, (num_rows,), device=device),
    )
    with poisoned_memory():
        drawn = operations.sample(logits, *arguments)
    assert torch.equal(drawn, plain.sample(logits, *arguments))
