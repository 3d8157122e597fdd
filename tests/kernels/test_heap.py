"""The heap's setting, looked at from outside: memory that is used again is not faulted in again."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys, torch
from kernels.heap import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("no glibc")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    pieces = [torch.ones(7_000_000) for _ in range(4)]
    del pieces
for _ in range(3):
    use()
before = faults()
for _ in range(2):
    use()
print(faults() - before)
"""


def num_faults(mode: str) -> int:
    command = [sys.executable, "-c", CODE, mode]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if "no glibc" in run.stderr:
        pytest.skip("this C library's malloc cannot be told")
    return int(run.stdout)


def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert num_faults("kept") * 20 < num_faults("left")
