"""Every Triton kernel on a real GPU at the size of a model with 8 billion parameters, against its twin in float64.

Errors that the interpreter cannot show are looked for here: races, pipelining, layouts, rounding of tensor cores.
"""

import math

import pytest
import torch

from kernels.backend import _operations_in, operations_for
from tests.kernels import twins

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PLAIN = _operations_in("kernels.plain")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = [(32, 8), (28, 4), (16, 16), (32, 1)]


@pytest.fixture
def triton_operations():
    pytest.importorskip("triton")
    torch.seed()  # fresh inputs each time: a failure names its seed below
    print("torch seed", torch.initial_seed())
    return operations_for(torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_decode_attention(triton_operations, heads, head_dim, dtype):
    for block_size, lens in ((16, [1, 0, 4097, 130, 1000, 16]), (48, [777] * 40), (128, [30000])):
        twins.check_decode(triton_operations, lens, heads, head_dim, block_size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_attention(triton_operations, heads, head_dim, dtype):
    for block_size, contexts, queries in (
        (16, [2048, 33, 4000, 7, 512], [2048, 33, 300, 0, 1]),
        (128, [8000], [700]),
    ):
        twins.check_prefill(triton_operations, contexts, queries, heads, head_dim, block_size, dtype, "cuda")


@pytest.mark.parametrize("num_sequences", [1, 3, 64, 256])
def test_one_captured_graph_serves_contexts_of_every_length(triton_operations, num_sequences):
    """The splits are chosen at capture; lengths are read on the GPU."""
    k, v, tables, lens = twins.paged_kv([3000] * num_sequences, 8, 128, 16, torch.bfloat16, "cuda")
    q = torch.randn(num_sequences, 32, 128, device="cuda").bfloat16()
    triton_operations.attention_decode(q, k, v, tables, lens, 0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_operations.attention_decode(q, k, v, tables, lens, 0.1)
    for _ in range(3):
        lens.copy_(torch.randint(1, 3001, (num_sequences,)))
        q.copy_(torch.randn_like(q))
        out.fill_(math.nan)
        graph.replay()
        expected = PLAIN.attention_decode(q.double(), k.double(), v.double(), tables, lens, 0.1)
        twins.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1024, 4096, 5120, 16384])
def test_norms(triton_operations, size, dtype):
    for num_rows in (1, 4099):
        twins.check_norms(triton_operations, PLAIN, num_rows, size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rope_norms_of_heads_and_kv_copies(triton_operations, head_dim, dtype):
    twins.check_norm_of_heads(triton_operations, PLAIN, 2049, head_dim, dtype, "cuda")
    twins.check_rope(triton_operations, PLAIN, 2049, (32, 8), head_dim, 16, dtype, "cuda")
    planes = twins.keys_and_values(8, head_dim, dtype)
    for layers, heads, tokens in (((0, 4), (0, 8), (0, 4800)), ((1, 3), (3, 5), (5, 4001))):
        twins.check_kv_copies(triton_operations, PLAIN, (4, 300, 16), planes, (layers, [heads] * 2, tokens), "cuda")


def test_kv_copies_of_planes_of_other_widths(triton_operations):
    for planes, heads in twins.OTHER_PLANES:
        twins.check_kv_copies(triton_operations, PLAIN, (3, 5, 16), planes, ((1, 3), heads, (5, 40)), "cuda")


def test_digests(triton_operations):
    for num_rows, row_words, unit_words in ((512, 2048, 1024), (3, 5000, 4096), (1, 8, 1024), (4096, 16, 16)):
        twins.check_digests(triton_operations, PLAIN, num_rows, row_words, unit_words, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(triton_operations, dtype):
    for num_rows in (1, 2049):
        twins.check_gate(triton_operations, PLAIN, (num_rows, 28672), dtype, "cuda")


def test_penalties_and_draws(triton_operations):
    twins.check_penalties(triton_operations, PLAIN, 64, 128256, 40, "cuda")
    for num_rows, vocab_size in ((1, 128256), (72, 128256), (256, 32000)):
        twins.check_draws(triton_operations, PLAIN, num_rows, vocab_size, "cuda")


def test_sampling_never_waits_for_the_gpu(triton_operations):
    logits = torch.randn(8, 32000, device="cuda")
    ones, zeros = torch.ones(8, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    arguments = (logits, ones, zeros + 40, ones * 0.9, ones * 0.01, zeros, zeros)
    triton_operations.sample(*arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_operations.sample(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
