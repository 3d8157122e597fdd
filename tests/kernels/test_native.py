"""The operations in C against their plain twins in float64, and what happens where they cannot be compiled."""

import math
import shutil
import tempfile

import pytest
import torch
import xxhash

from kernels.backend import _operations_in, operations_for
from kernels.native import gather_kv, library
from kernels.native.attention_decode import attention_decode
from kernels.native.silu_mul import silu_mul
from kernels.native.xxh3_kv import _xxh3, xxh3_kv
from kernels.plain.xxh3_kv import xxh3_kv as plain_xxh3_kv
from tests.kernels import twins

PLAIN = _operations_in("kernels.plain")
NATIVE = _operations_in("kernels.native", "kernels.plain")
F32, BF16 = torch.float32, torch.bfloat16

SHAPES = [  # (query heads, KV heads), head_dim, block_size, dtype
    ((8, 2), 64, 16, F32),
    ((12, 4), 64, 16, BF16),
    ((4, 1), 128, 128, BF16),
    ((3, 3), 80, 32, F32),
    ((7, 1), 96, 48, BF16),
    ((20, 1), 16, 16, F32),
    ((2, 1), 256, 4, BF16),
]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    torch.manual_seed(3)
    assert library.function("silu_mul", "ppii", BF16) is not None


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "dtype"), SHAPES)
def test_decode_attention(heads, head_dim, block_size, dtype, num_threads):
    torch.set_num_threads(num_threads)
    twins.check_decode(NATIVE, [1, 15, 0, 17, 130, 257], heads, head_dim, block_size, dtype, "cpu")
    twins.check_decode(NATIVE, [5000, 3], heads, head_dim, block_size, dtype, "cpu")


@pytest.mark.parametrize(("head_dim", "block_size"), [(24, 16), (64, 6)])
def test_decode_attention_of_shapes_that_c_does_not_take(head_dim, block_size):
    twins.check_decode(NATIVE, [1, 15, 130], (4, 2), head_dim, block_size, F32, "cpu")


def test_a_context_of_its_own_nan_gives_nan_and_disturbs_no_other() -> None:
    k, v, tables, lens = twins.paged_kv([40, 40], 1, 64, 16, F32, "cpu")
    q = torch.randn(2, 2, 64)
    clean = attention_decode(q, k, v, tables, lens, 0.1)
    k[tables[0, 0], 0, 3] = math.nan
    out = attention_decode(q, k, v, tables, lens, 0.1)
    assert bool(out[0].isnan().all())
    assert torch.equal(out[1], clean[1])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("num_rows", "size"), [(5, 33), (1, 5120), (700, 64)])
def test_norms(num_rows, size, dtype):
    twins.check_norms(NATIVE, PLAIN, num_rows, size, dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("head_dim", [24, 128])
def test_norms_of_heads_in_place(head_dim, dtype):
    twins.check_norm_of_heads(NATIVE, PLAIN, 5, head_dim, dtype, "cpu")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(3, 14), (2, 3, 96), (1, 5000), (0, 8)])
def test_gate(shape, dtype):
    if shape[0]:
        twins.check_gate(NATIVE, PLAIN, shape, dtype, "cpu")
    else:
        assert silu_mul(torch.empty(shape, dtype=dtype)).shape == (0, 4)


def test_the_gate_of_extreme_numbers() -> None:
    gates = torch.tensor([-1000.0, -100.0, -88.5, -20.0, 0.0, 20.0, 88.5, 1000.0, math.nan])
    out = silu_mul(torch.cat((gates, torch.ones(len(gates)))))
    torch.testing.assert_close(out[:-2], torch.nn.functional.silu(gates[:-2]), atol=1e-30, rtol=1e-6)
    assert out[-2] == 1000.0
    assert out[-1].isnan()


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    """x * silu(30) has as many bits as x; the products end in every pattern that rounding can meet."""
    up = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(BF16)
    gate = up.flip(0) + 30
    expected = (torch.nn.functional.silu(gate.float()) * up.float()).to(BF16)
    assert torch.equal(silu_mul(torch.cat((gate, up))), expected)


@pytest.mark.parametrize(("heads", "head_dim", "block_size", "dtype"), SHAPES)
def test_rope_and_cache_write(heads, head_dim, block_size, dtype):
    for num_tokens in (5, 300):
        twins.check_rope(NATIVE, PLAIN, num_tokens, heads, head_dim, block_size, dtype, "cpu")


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 8), (16, 80), (4, 128), (6, 3), (128, 64)])
def test_kv_copies(block_size, head_dim, dtype, num_threads):
    """Whole and partial blocks; runs shorter than a cache line, and some that begin and end in the middle of one."""
    torch.set_num_threads(num_threads)
    sizes, end = (3, 12, block_size), 12 * block_size
    planes = twins.keys_and_values(4, head_dim, dtype)
    for tokens in ((0, end), (0, 1), (5, end - 3), (end - 1, end), (block_size, 3 * block_size), (7, 7)):
        for layers, heads in (((0, 3), (0, 4)), ((1, 2), (1, 3)), ((2, 3), (3, 4))):
            twins.check_kv_copies(NATIVE, PLAIN, sizes, planes, (layers, [heads, heads], tokens), "cpu")


@pytest.mark.parametrize("num_blocks", [5, 300])
def test_kv_copies_of_planes_of_other_widths(num_blocks):
    odd = [(2, 3, torch.uint8), (1, 5, F32)], [(0, 2), (0, 1)]  # where no float of the payload is aligned
    for planes, heads in [*twins.OTHER_PLANES, odd]:
        area = (1, 3), heads, (5, 16 * num_blocks - 7)
        twins.check_kv_copies(NATIVE, PLAIN, (3, num_blocks, 16), planes, area, "cpu")


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("offset", [1, 3, 31])
def test_payloads_may_lie_anywhere(offset, is_compiled, monkeypatch):
    """What has arrived begins where its transport put it."""
    if not is_compiled:
        monkeypatch.setattr(gather_kv, "function", lambda *_: None)
    cache, table, area = torch.randn(2, 2, 5, 3, 16, 40), torch.randperm(5), ((0, 2), [(1, 3), (0, 1)], (3, 70))
    payload = PLAIN.gather_kv(cache, table, *area)
    room = torch.empty(payload.nbytes + offset, dtype=torch.uint8)[offset:]
    assert torch.equal(NATIVE.gather_kv(cache, table, *area, room), payload)
    target, expected = torch.zeros(2, *cache.shape)
    NATIVE.scatter_kv(room, target, table, *area)
    PLAIN.scatter_kv(payload, expected, table, *area)
    assert torch.equal(target, expected)


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "unit_bytes"), [(6, 8192, 4096), (5, 700, 256), (2, 24, 64), (1, 1, 16)]
)
def test_host_digests(num_rows, row_bytes, unit_bytes):
    payload = torch.randint(0, 256, (num_rows * row_bytes + 1,), dtype=torch.uint8)[1:]
    found = xxh3_kv(payload, row_bytes, unit_bytes)
    assert found == plain_xxh3_kv(payload, row_bytes, unit_bytes)
    assert found[-8:] == xxhash.xxh3_64_digest(
        payload[(row_bytes - 1) // unit_bytes * unit_bytes - row_bytes :].numpy()
    )


def test_host_digests_of_a_package_that_does_not_show_its_function(monkeypatch):
    monkeypatch.setattr("kernels.native.xxh3_kv._HASHES", ())
    monkeypatch.setattr("kernels.native.xxh3_kv._xxh3", _xxh3.__wrapped__)
    payload = torch.randint(0, 256, (640,), dtype=torch.uint8)
    assert _xxh3.__wrapped__() is None
    assert xxh3_kv(payload, 320, 128) == plain_xxh3_kv(payload, 320, 128)


def test_a_cpu_computes_in_c() -> None:
    operations = operations_for(torch.device("cpu"))
    assert operations.attention_decode is attention_decode
    assert operations.gather_kv is NATIVE.gather_kv is not PLAIN.gather_kv
    assert operations.attention_prefill is PLAIN.attention_prefill


def test_without_a_compiler_plain_torch_serves_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(library, "function", library.function.__wrapped__)
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    assert library.function("silu_mul", "ppii", F32) is None
    assert "no-such-compiler" in caplog.text


def test_types_that_c_lacks_are_left_to_plain_torch() -> None:
    x = torch.randn(3, 8).half()
    assert torch.equal(silu_mul(x), PLAIN.silu_mul(x))


def test_a_home_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert library._library.__wrapped__(F32) is not None
    assert [file.suffix for file in tmp_path.glob("tandem-*/*")] == [".so"]
