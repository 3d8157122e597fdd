"""Which implementation of each operation a device gets. Asked by whoever runs operations, once, when it is built.

Triton is imported for a CUDA device only: a worker on a CPU starts without it, and need not have it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module

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
    """Return the operations to use on device: Triton's on a GPU where Triton is installed, otherwise plain torch's."""
    if device.type == "cpu":
        return _operations_in("kernels.plain")
    if device.type == "cuda":
        return _operations_in("kernels.triton" if _has_triton() else "kernels.plain")
    raise ValueError(f"no operations for a device of type {device.type!r}; there are some for cpu and cuda")


@cache
def _operations_in(package: str) -> Operations:
    """Collect the operations of a package, each from the file of its own name."""
    files = {"add_rms_norm": "rms_norm"}
    names = [field.name for field in fields(Operations)]
    return Operations(**{name: getattr(import_module(f"{package}.{files.get(name, name)}"), name) for name in names})


def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True
