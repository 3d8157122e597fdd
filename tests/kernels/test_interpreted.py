"""Runs the tests in interpreted/ in a process of their own, where Triton kernels are interpreted on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_interpreted_kernels_equal_their_plain_twins() -> None:
    pytest.importorskip("triton", minversion="3.7")  # the interpreter of 3.6 fails with NumPy from 2.4 on
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
