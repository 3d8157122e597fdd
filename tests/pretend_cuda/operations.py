"""Kernels of the pretended device: each launch is one piece of work on a stream.

Either Triton's own, in its interpreter, or the plain twins in their place, which are a hundred times as fast and say so
when an index leads out of a tensor.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.backend import Operations
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
    def launch(cache: Tensor, table: Tensor, layers: Any, heads: Any, tokens: Any, out: Tensor | None = None) -> Tensor:
        sizes = [stop - start for start, stop in (layers, heads, tokens)]
        shape = (sizes[0], 2, *sizes[1:], cache.shape[-1])
        target = cache.new_empty(shape) if out is None else out.view(shape)
        cuda.launch(operation, cache, table, layers, heads, tokens, target, results=[])
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
