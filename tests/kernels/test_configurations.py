"""Every Triton kernel in every configuration, compiled to machine code for every chip, on a machine that has none.

Kernels are compiled as their callers launch them, so a launch that would not compile on a GPU fails here. Also the
choice of splits, and that nothing imports Triton where it is not needed.
"""

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kernels.backend import operations_for  # noqa: E402
from kernels.triton import attention_decode, attention_prefill  # noqa: E402
from kernels.triton import configurations as table  # noqa: E402
from kernels.triton.digest_kv import digest_kv  # noqa: E402
from kernels.triton.gather_kv import gather_kv  # noqa: E402
from kernels.triton.penalize import penalize  # noqa: E402
from kernels.triton.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from kernels.triton.rope_and_write_kv import rope_and_write_kv  # noqa: E402
from kernels.triton.sample import sample  # noqa: E402
from kernels.triton.scatter_kv import scatter_kv  # noqa: E402
from kernels.triton.silu_mul import silu_mul  # noqa: E402

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = list(itertools.product((64, 80, 96, 128, 256), (BF16, F16, F32)))
"""head_dim and dtype: every entry of the tables, and dimensions that are no power of two."""


@dataclass
class Compiler:
    """Stands in for the driver of a GPU: launches compile for its chip, and nothing runs."""

    chip: int
    folder: Path
    kernels: list[tuple[object, int]] = field(default_factory=list)
    """What was compiled, and how many bytes per thread it may spill."""

    def get_current_device(self) -> int:
        return self.chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)

    def check(self, **declared: table.Configuration) -> None:
        """Hold everything compiled since the last check to what is declared for each kernel, all of which must be."""
        assert {kernel.name for kernel in self.kernels} == declared.keys()
        for kernel in self.kernels:
            spilled = stack_bytes(kernel.asm["cubin"], self.folder / "kernel.cubin")
            assert spilled <= declared[kernel.name].max_spill_bytes, f"{kernel.name} spills {spilled} bytes per thread"
            assert kernel.metadata.shared <= table.MAX_SHARED_BYTES[self.chip], kernel.name
        self.kernels.clear()


def stack_bytes(cubin: bytes, file: Path) -> int:
    """Return the bytes of local memory per thread, where spilled registers go; kernels here put nothing else there."""
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


@pytest.fixture(params=sorted(table.MAX_SHARED_BYTES), ids="sm_{}".format)
def compiler(request, tmp_path, monkeypatch):
    compiler = Compiler(request.param, tmp_path)
    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiler.kernels.append(run(kernel, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", compiler)
    monkeypatch.setattr(attention_prefill, "chip", lambda device: compiler.chip)
    return compiler


def attention_inputs(head_dim: int, dtype: torch.dtype, heads=(8, 2), block_size=16) -> tuple[torch.Tensor, ...]:
    q = torch.empty(3, heads[0], head_dim, dtype=dtype)
    cache = torch.empty(2, heads[1], block_size, head_dim, dtype=dtype)
    return q, cache, cache, torch.zeros(3, 900, dtype=torch.int32)


@pytest.mark.parametrize(("head_dim", "dtype"), SHAPES)
def test_attention_compiles(compiler, head_dim, dtype):
    check_attention(compiler, attention_inputs(head_dim, dtype))


@pytest.mark.parametrize(("heads", "block_size"), [((7, 1), 128), ((20, 1), 48)])
def test_attention_compiles_for_other_groups_and_blocks(compiler, heads, block_size):
    check_attention(compiler, attention_inputs(128, F16, heads, block_size))


def check_attention(compiler: Compiler, inputs: tuple[torch.Tensor, ...]) -> None:
    q, dims = inputs[0], table.padded(inputs[0].shape[-1])
    lens, starts = torch.ones(3, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    attention_decode.attention_decode(*inputs, lens, 0.1)
    decode = table.ATTENTION_DECODE[q.element_size(), dims]
    compiler.check(_attend_split=decode, _merge_splits=table.SPLIT_MERGE)
    attention_prefill.attention_prefill(*inputs, starts, lens, 0.1)
    prefill = table.ATTENTION_PREFILL[compiler.chip, q.element_size(), dims]
    compiler.check(_attend_tile=prefill, _order_tiles=table.ATTENTION_PLAN)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_norms_compile(compiler, dtype):
    for size, config in table.RMS_NORM.items():
        x, weight = torch.empty(3, size, dtype=dtype), torch.empty(size, dtype=dtype)
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, x, weight, 1e-5)
        compiler.check(_rms_norm=config)


@pytest.mark.parametrize(("head_dim", "dtype"), SHAPES)
def test_rope_norms_of_heads_and_kv_copies_compile(compiler, head_dim, dtype):
    dims = table.padded(head_dim)
    heads = torch.empty(3, 12, head_dim, dtype=dtype)
    q, k, v = heads.split([8, 2, 2], dim=1)
    cache = torch.empty(2, 2, 3, 2, 16, head_dim, dtype=dtype)  # keys and values
    angles, slots = torch.empty(3, head_dim // 2), torch.zeros(3, dtype=torch.int64)
    rms_norm(q, torch.empty(head_dim, dtype=dtype), 1e-5)
    compiler.check(_rms_norm=table.RMS_NORM[dims])
    rope_and_write_kv(q, k, v, angles, angles, slots, cache[0, 0], cache[0, 1])
    compiler.check(_rope_and_write_kv=table.ROPE[dims])
    check_kv_copies(compiler, [*cache])
    unit_bytes = 16 * head_dim * dtype.itemsize
    digest_kv(torch.empty(2 * unit_bytes, dtype=torch.uint8), unit_bytes, unit_bytes)
    compiler.check(_digest_kv=table.DIGEST)


def check_kv_copies(compiler: Compiler, planes: list[torch.Tensor]) -> None:
    area = torch.zeros(3, dtype=torch.int64), (0, 1), [(0, 1) for _ in planes], (3, 40)
    scatter_kv(gather_kv(planes, *area), planes, *area)
    words = max(plane.shape[-1] * plane.itemsize // 4 for plane in planes)
    config = table.KV_COPY[table.padded(words, least=32)]
    compiler.check(_gather_kv=config, _scatter_kv=config)


@pytest.mark.parametrize("shapes", [[(576, BF16)], [(576, F32)], [(64, BF16), (192, BF16)], [(8, BF16), (1, F32)]])
def test_copies_of_other_planes_compile(compiler, shapes):
    check_kv_copies(compiler, [torch.empty(2, 3, 1, 16, dim, dtype=dtype) for dim, dtype in shapes])


def test_the_gate_and_sampling_compile(compiler):
    for dtype in (BF16, F16, F32):
        silu_mul(torch.empty(3, 28672, dtype=dtype))
        compiler.check(_silu_mul=table.SILU_MUL)
    integers, reals = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    tables = torch.zeros(3, 128256, dtype=torch.int32), torch.zeros(3, 128256, dtype=torch.bool)
    penalize(torch.empty(3, 128256), integers, integers, *tables, reals, reals, reals)
    compiler.check(_penalize=table.PENALIZE)
    sample(torch.empty(3, 128256), reals, integers, reals, reals, integers, integers)
    compiler.check(_find_widest_gap=table.SAMPLE_FILTER, _draw_in_tile=table.SAMPLE_DRAW)


def test_a_batch_of_another_size_needs_no_other_machine_code(compiler):
    """Sizes and alignments change from step to step; no request may wait for a compilation."""
    for num in (1, 2, 16, 33):
        q, k, v, tables = (x[:1].expand(num, *x.shape[1:]).contiguous() for x in attention_inputs(64, BF16))
        ones = torch.ones(num + 5, dtype=torch.int32)
        lens, starts = ones[num % 3 : num % 3 + num], torch.arange(num + 1, dtype=torch.int32)
        attention_decode.attention_decode(q, k, v, tables[:, : 7 * num], lens, 0.1)
        attention_prefill.attention_prefill(q, k, v, tables[:, :num], starts, lens, 0.1)
        add_rms_norm(q[:, 0].contiguous(), q[:, 0].contiguous(), q[0, 0], 1e-5)
        planes = [k.view(num, 1, *k.shape[1:]), v.view(num, 1, *v.shape[1:])]
        payload = gather_kv(planes, *kv_ranges(num))
        scatter_kv(payload, planes, *kv_ranges(num))
        digest_kv(payload[: num * 256], num * 256, 2048)
        sample(torch.empty(num, 1000), *sampling_arguments(num))
    variants = {(kernel.name, kernel.hash) for kernel in compiler.kernels}
    assert len(variants) == len({name for name, _ in variants})


def kv_ranges(num: int) -> tuple[torch.Tensor, tuple[int, int], list[tuple[int, int]], tuple[int, int]]:
    heads = [(0, 1 + num % 2), (num % 2, 2)]
    return torch.zeros(num + 1, dtype=torch.int64)[1:], (0, num), heads, (num % 4, num % 4 + num)


def sampling_arguments(num: int) -> tuple[torch.Tensor, ...]:
    integers, reals = torch.zeros(num, dtype=torch.int64), torch.ones(num)
    return reals, integers, reals, reals, integers, integers


def test_splits_fill_the_gpu_and_bound_the_longest_context():
    for rows, context, programs in itertools.product((1, 8, 96, 128, 512, 2048), (64, 1024, 32768, 131072), (8, 264)):
        splits, least_len = table.choose_splits(rows, context, 64, programs)
        assert 1 <= splits <= min(128, -(-context // 64))
        assert least_len % 64 == 0
        assert context / splits <= 4096 or splits == 128
        if rows * splits < 0.9 * programs:
            assert splits == min(128, -(-context // 64))
    assert table.choose_splits(8, 8192, 64, 264)[0] >= 30
    assert table.choose_splits(2048, 1024, 64, 264) == (1, 64)
    assert table.choose_splits(512, 32768, 64, 264) == (8, 512)


def test_a_cpu_needs_no_triton_and_other_devices_are_refused():
    code = (
        "import sys, torch; from kernels.backend import operations_for; "
        "assert operations_for(torch.device('cpu')).sample.__module__ == 'kernels.plain.sample'; "
        "import worker.life, router.process; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
    assert operations_for(torch.device("cuda")).sample is sample
    with pytest.raises(ValueError, match="mps"):
        operations_for(torch.device("mps"))
