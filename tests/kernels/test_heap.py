"""The heap's setting, as malloc itself reports it: what tensors let go of stays with the process."""

import subprocess
import sys
from pathlib import Path

import pytest

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
