"""Compiles the C files beside it, once per machine and element type, and loads what came of it.

Called by the operations here. Compiled for exactly this processor, so a library is named by it, by the compiler and by
the sources, and kept in the user's cache. Threads are those of torch's own pool: a second one would fight it for cores.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
ELEMENTS = {torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT32"}
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
WIDEST_VECTORS = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
COMPILE_S = 120

_log = logging.getLogger(__name__)


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@cache
def function(name: str, parameters: str, dtype: torch.dtype = torch.float32) -> Callable[..., None] | None:
    """Return the C function of that name for elements of dtype; None where only the plain twin serves.

    parameters: one letter each, p for a pointer (an address as an int), i for an int64_t, f for a float. A function of
    bytes, which knows no elements, is the same for every dtype.
    """
    found = _library(dtype)
    if found is None:
        return None
    symbol = found[name]
    symbol.argtypes, symbol.restype = [_TYPES[letter] for letter in parameters], None
    return symbol


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    if dtype not in ELEMENTS:
        return None
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or "cc"]
    try:
        return ctypes.CDLL(str(_compiled(compiler, ELEMENTS[dtype])))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("operations in C cannot be compiled, so plain torch serves, more slowly: %s", reason)
        return None


def _compiled(compiler: list[str], element: str) -> Path:
    """Return the library that compiler makes of the sources, from the cache if it is there."""
    command = [*compiler, f"-D{element}", *FLAGS, *WIDEST_VECTORS, *_threads()]
    sources = sorted(SOURCES.glob("*.[ch]"))
    version = _run([*compiler, "--version"])
    target = _cache_folder() / f"{_digest([*command, version, _processor()], sources)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            files = [str(source) for source in sources if source.suffix == ".c"]
            _run([*command, *files, "-o", str(made), "-lm"])
            made.replace(target)  # ranks of one machine may all compile at once; each gets a whole file
    return target


def _threads() -> list[str]:
    pools = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-fopenmp", "-Wl,--as-needed", str(pools[0])] if pools else ["-fopenmp-simd"]


def _digest(circumstances: list[str], sources: list[Path]) -> str:
    digest = hashlib.sha256(repr(circumstances).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Return what tells apart processors that need not run one another's code, since homes may be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {features}"


def _cache_folder() -> Path:
    """Return a folder of this user's, since code is loaded from it. Raise OSError where there is none."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    elsewhere = Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"
    for folder in (home, elsewhere):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
    raise OSError(f"neither {home} nor {elsewhere} is a folder of this user's that can be written to")


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_S).stdout  # noqa: S603
