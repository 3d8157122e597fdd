"""Lets torch's C++ handle tensors that say they are on CUDA. Called once per process, before the first such tensor.

A CUDA build on a machine without a GPU needs no more than a call; a CPU build gets the little that it lacks compiled.
"""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("guard.cpp")


@cache
def set_device_guard() -> None:
    """Raise OSError or CalledProcessError where there is no C++ compiler."""
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        subprocess.run(["c++", *options, str(_SOURCE), "-o", str(library), "-lc10"], check=True, timeout=120)
        ctypes.CDLL(str(library))
