"""Kernels of the pretended device: each launch is one piece of work on a stream.

Either Triton's own, in its interpreter, or the plain twins in their place, which are a hundred times as fast and say so
when an index leads out of a tensor.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.backend import Operations
from kernels.plain.gather_kv import new_payload
from tests.pretend_cuda.device import PretendCuda
from tests.pretend_cuda.tensor import PretendTensor

Results = Callable[..., list[Tensor]]

_RESULTS: dict[str, Results] = {
    "attention_decode": lambda q, *_: [q.new_empty(q.shape)],
    "attention_prefill": lambda q, *_: [q.new_empty(q.shape)],
    "rms_norm": lambda x, *_: [x.new_empty(x.shape)],
    "add_rms_norm": lambda x, *_: [x.new_empty(x.shape), x.new_empty(x.shape)],
    "rope_and_write_kv": lambda q, *_: [q.new_empty(q.shape)],
    "silu_mul": lambda x: [x.new_empty((*x.shape[:-1], x.shape[-1] // 2))],
    "scatter_kv": lambda *_: [],
    "digest_kv": lambda payload, row, unit: [
        payload.new_empty(len(payload) // row * -(-row // unit), dtype=torch.int64)
    ],
    "penalize": lambda *_: [],
    "sample": lambda logits, *_: [logits.new_empty(len(logits), dtype=torch.int64)],
}


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's own kernels are run; it has to be said before the first of them is imported."""


def use_kernels(monkeypatch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    """Let the device have kernels."""
    (_interpret_triton if IS_INTERPRETED else _use_plain_twins)(monkeypatch, cuda)


def _use_plain_twins(monkeypatch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    """Let every operation on the device be its plain twin on the memory behind it."""
    plain, original = backend._operations_in("kernels.plain"), backend._operations_in
    twins = {name: _launched(cuda, getattr(plain, name), results) for name, results in _RESULTS.items()}
    on_device = Operations(**twins, gather_kv=_gather(cuda, plain.gather_kv))
    monkeypatch.setattr(
        backend,
        "_operations_in",
        lambda *packages: on_device if packages == ("kernels.triton",) else original(*packages),
    )


def _launched(cuda: PretendCuda, operation: Callable[..., Any], results: Results) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        found = results(*args)
        cuda.launch(operation, *args, results=found)
        return None if not found else found[0] if len(found) == 1 else tuple(found)

    return launch


def _gather(cuda: PretendCuda, operation: Callable[..., Any]) -> Callable[..., Tensor]:
    def launch(planes: Sequence[Tensor], *area: Any) -> Tensor:
        table, layers, heads, tokens, *out = area
        target = out[0] if out else new_payload(planes, layers, heads, tokens)
        cuda.launch(operation, planes, table, layers, heads, tokens, target, results=[])
        return target

    return launch


def _interpret_triton(monkeypatch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    """Let Triton's kernels be interpreted when the device comes to them."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(value, PretendTensor) for value in args):
            cuda.launch(lambda *inner, **named: run(executor, *inner, **named), *args, results=[], **kwargs)
        else:
            run(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)


def note_compilations(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Let every operation also make the launches of its Triton kernels; return what has to be compiled for them so far.

    They do nothing, their results come from the plain twins. Triton compiles a kernel once for every combination of its
    constants, of types, of which pointers are aligned, and of which integers are 1 or multiples of 16.
    """
    from triton.runtime.jit import JITFunction

    noted: set[tuple[Any, ...]] = set()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        special = tuple(_specialized(parameter, named.pop(parameter.name)) for parameter in kernel.params)
        noted.add((kernel.__name__, special, tuple(sorted(named.items()))))

    twins, triton = backend._operations_in("kernels.triton"), import_triton()
    both = {field.name: _after(getattr(triton, field.name), getattr(twins, field.name)) for field in fields(Operations)}
    choose, on_device = backend._operations_in, Operations(**both)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(
        backend,
        "_operations_in",
        lambda *packages: on_device if packages == ("kernels.triton",) else choose(*packages),
    )
    return noted


def import_triton() -> Operations:
    """Return Triton's operations, whatever stands in their place."""
    return Operations(
        **{field.name: backend._operation(field.name, ("kernels.triton",)) for field in fields(Operations)}
    )


def _after(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any) -> Any:
        first(*args)
        return second(*args)

    return both


def _specialized(parameter: Any, value: Any) -> Any:
    """Return what a compiled kernel depends on of one argument."""
    if parameter.is_constexpr or value is None:
        return value
    if isinstance(value, Tensor):
        is_free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        return value.dtype, None if is_free else value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return tuple(_specialized_in_tuple(each) for each in value)
    if isinstance(value, int) and not parameter.do_not_specialize:
        return value == 1, value % 16 == 0
    return type(value).__name__


def _specialized_in_tuple(value: Any) -> Any:
    """Whatever a kernel says of its parameters, what is in a tuple is looked at."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return value == 1, value % 16 == 0
