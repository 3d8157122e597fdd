"""The packed linear map against float64, for every dtype and odd numbers of rows, and its fallback."""

import pytest
import torch

from kernels.plain import linear
from kernels.plain.linear import Linear

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["packed", "fallback"])
def _implementation(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(linear, "_pack", lambda weight: None)


@pytest.mark.usefixtures("_implementation")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16, 33, 257])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(48, 32), (129, 65), (1, 7)])
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
