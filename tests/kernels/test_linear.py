"""The linear map against float64 for every dtype and odd numbers of rows: in C, packed, and as torch has it."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels import linear
from kernels.linear import Linear
from kernels.native.linear import few_rows_linear

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["in C", "packed", "plain"])
def _implementation(request, monkeypatch):
    if request.param != "in C":
        monkeypatch.setattr(linear, "few_rows_linear", lambda weight, bias: None)
    if request.param == "plain":
        monkeypatch.setattr(linear, "_pack", lambda weight: None)


@pytest.mark.usefixtures("_implementation")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 7, 12, 13, 33, 257])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(48, 32), (132, 96), (1024, 2080), (129, 65), (1, 7)])
def test_it_is_the_product_plus_the_bias(dtype, num_rows, num_outputs, num_inputs):
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
    bias = torch.randn(num_outputs, generator=generator).to(dtype)
    x = torch.randn(num_rows, num_inputs, generator=generator).to(dtype)
    for used_bias in (None, bias):
        out = Linear(weight, used_bias)(x)
        expected = x.double() @ weight.double().T + (0 if used_bias is None else used_bias.double())
        assert out.shape == (num_rows, num_outputs)
        assert out.dtype == dtype
        if num_rows:
            assert (out.double() - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_float32_and_bfloat16_weights_are_packed_on_a_cpu_with_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert linear._pack(torch.randn(64, 64)) is not None


def test_a_few_rows_are_computed_in_c_where_there_is_a_compiler():
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    for dtype in (torch.float32, torch.bfloat16):
        assert few_rows_linear(torch.randn(64, 64, dtype=dtype), None) is not None
    assert few_rows_linear(torch.randn(64, 64, dtype=torch.float16), None) is None


def test_rows_of_a_wider_tensor_and_weights_of_a_taller_one_are_read_as_they_are():
    weight, x = torch.randn(64, 128), torch.randn(5, 256)
    out = Linear(weight[:, :64])(x[:, 64:128])
    torch.testing.assert_close(out, x[:, 64:128] @ weight[:, :64].T, atol=1e-4, rtol=1e-4)


def test_what_is_not_a_number_stays_in_its_row():
    x = torch.randn(6, 64)
    clean = Linear(torch.eye(64))(x)
    x[2, 3] = float("nan")
    out = Linear(torch.eye(64))(x)
    assert bool(out[2].isnan().all())
    assert torch.equal(torch.cat((out[:2], out[3:])), torch.cat((clean[:2], clean[3:])))


def test_threads_that_multiply_at_once_and_share_with_helpers_get_what_each_gets_alone():
    """Ranks of a test are threads of one process; only one at a time has helpers."""
    torch.manual_seed(5)
    maps = [Linear(torch.randn(num_outputs, 64)) for num_outputs in (64, 640, 4, 1000)]
    inputs = [torch.randn(num_rows, 64) for num_rows in (1, 5, 12)]
    torch.set_num_threads(1)
    alone = [multiply(x) for multiply in maps for x in inputs]

    def is_same(_: int) -> bool:
        torch.set_num_threads(4)
        both = zip(alone, (multiply(x) for multiply in maps for x in inputs), strict=True)
        return all(torch.equal(one, other) for one, other in both)

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(is_same, range(1500), timeout=60))
