"""Which implementation of each operation a device gets. Asked by whoever runs operations, once, when it is built.

Triton is imported for a CUDA device only: a worker on a CPU starts without it, and need not have it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of every operation; signatures are those of kernels/plain."""

    attention_decode: Callable[..., Tensor]
    attention_prefill: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_and_write_kv: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    gather_kv: Callable[..., Tensor]
    scatter_kv: Callable[..., None]
    digest_kv: Callable[..., Tensor]
    penalize: Callable[..., None]
    sample: Callable[..., Tensor]


def operations_for(device: torch.device) -> Operations:
    """Return the operations to use on device: Triton's on a GPU where Triton is installed, on a CPU those in C.

    Otherwise, and for operations that C has no file of, plain torch's.
    """
    if device.type == "cpu":
        return _operations_in("kernels.native", "kernels.plain")
    if device.type == "cuda":
        return _operations_in("kernels.triton" if _has_triton() else "kernels.plain")
    raise ValueError(f"no operations for a device of type {device.type!r}; there are some for cpu and cuda")


@cache
def _operations_in(*packages: str) -> Operations:
    """Collect the operations, each from the file of its own name in the first package that has one."""
    return Operations(**{field.name: _operation(field.name, packages) for field in fields(Operations)})


def _operation(name: str, packages: tuple[str, ...]) -> Callable[..., Any]:
    file = {"add_rms_norm": "rms_norm"}.get(name, name)
    package = next(package for package in packages if find_spec(f"{package}.{file}"))
    operation: Callable[..., Any] = getattr(import_module(f"{package}.{file}"), name)
    return operation


def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True
