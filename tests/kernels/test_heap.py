"""What tensors let go of stays with the process, as malloc itself reports it; large ones get large pages."""

import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.heap import on_huge_pages

CODE = """
import ctypes, sys, torch
from kernels.heap import keep_freed_memory

class Report(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

report = getattr(ctypes.CDLL(None), "mallinfo2", None)
if report is None or (sys.argv[1] == "kept" and not keep_freed_memory()):
    sys.exit("no glibc")
report.restype = Report
pieces = [torch.ones(7_000_000) for _ in range(4)]
del pieces
print(report().fordblks)
"""


def num_bytes_kept(mode: str) -> int:
    command = [sys.executable, "-c", CODE, mode]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if "no glibc" in run.stderr:
        pytest.skip("this C library's malloc cannot be told, or asked")
    return int(run.stdout)


def test_freed_memory_is_kept() -> None:
    assert num_bytes_kept("kept") > 4 * 28_000_000
    assert num_bytes_kept("left") < 28_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_on_huge_pages_is_the_same_tensor(dtype: torch.dtype) -> None:
    tensor = torch.randn(1003, 1501).to(dtype)
    assert torch.equal(on_huge_pages(tensor), tensor)
    small = torch.randn(10)
    assert on_huge_pages(small) is small


def test_the_system_is_asked_for_huge_pages() -> None:
    copy = on_huge_pages(torch.randn(4 << 20))
    smaps = Path("/proc/self/smaps")
    if not smaps.exists() or not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system does not say, or has none")
    assert "hg" in _flags(smaps.read_text(), copy.data_ptr())


def _flags(smaps: str, address: int) -> list[str]:
    """Return the flags of the mapping that holds address."""
    is_there = False
    for line in smaps.splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(mapping[1], 16) <= address < int(mapping[2], 16)
        if is_there and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
