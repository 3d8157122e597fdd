"""The pretended device as a whole, in torch's place for as long as a test runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretend_cuda.graphs import Graphs
from tests.pretend_cuda.guard import set_device_guard
from tests.pretend_cuda.memory import Allocator
from tests.pretend_cuda.streams import Timeline, Work
from tests.pretend_cuda.tensor import Dispatcher, PretendMode, PretendTensor

TOTAL_BYTES = 1 << 28


class PretendCuda:
    """A device of the given memory whose streams are served in an order of the given seed."""

    def __init__(self, seed: int = 0, total_bytes: int = TOTAL_BYTES) -> None:
        self.timeline = Timeline(seed)
        self.allocator = Allocator(self.timeline, total_bytes)
        self.graphs = Graphs(self.timeline, self.allocator)
        self._pinned: dict[int, Tensor] = {}  # by where their memory begins; it stays pinned, and never is another's

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def launch(self, operation: Callable[..., Any], *args: Any, results: list[Any], **kwargs: Any) -> None:
        """Queue a kernel; results: what it returns is put there. Its tensors must be the device's."""
        inner = [_inner(value) for value in args]
        named = {key: _inner(value) for key, value in kwargs.items()}
        targets = [result.inner for result in results]

        def run() -> None:
            found = operation(*inner, **named)
            for target, value in zip(targets, found if isinstance(found, tuple) else [found], strict=False):
                target.copy_(value)

        self.timeline.queue(Work(run), self.timeline.current_stream())

    def new_empty(self, like: Tensor) -> PretendTensor:
        """Return memory of the device for a tensor like that."""
        return Dispatcher(self).empty(like)

    def properties(self, device: object = None) -> Any:
        """As torch.cuda.get_device_properties."""
        return SimpleNamespace(
            name="a pretended H200",
            major=9,
            minor=0,
            multi_processor_count=2,
            shared_memory_per_block_optin=232_448,
            total_memory=TOTAL_BYTES,
            uuid="GPU-pretended",
        )

    def cudart(self) -> Any:
        """As torch.cuda.cudart: that memory of the host is pinned where it lies."""

        def register(pointer: int, num_bytes: int, flags: int) -> int:
            self._pinned[pointer] = torch.empty(0)
            return 0

        def unregister(pointer: int) -> int:
            return 0 if self._pinned.pop(pointer, None) is not None else 1

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, seed: int = 0, total_bytes: int = TOTAL_BYTES) -> Iterator[PretendCuda]:
    """Let torch have this device, in this thread and in those that are started meanwhile."""
    set_device_guard()
    cuda = PretendCuda(seed, total_bytes)
    with monkeypatch.context() as patch, PretendMode(cuda):
        _replace_torch_cuda(patch, cuda)
        _activate_in_threads(patch, cuda)
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield cuda
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)


def _replace_torch_cuda(patch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    timeline, allocator, graphs = cuda.timeline, cuda.allocator, cuda.graphs
    calls: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "Stream": timeline.new_stream,
        "Event": timeline.new_event,
        "current_stream": timeline.current_stream,
        "stream": timeline.on_stream,
        "synchronize": timeline.synchronize,
        "CUDAGraph": graphs.new,
        "graph": graphs.capture,
        "graph_pool_handle": graphs.pool_handle,
        "mem_get_info": allocator.info,
        "empty_cache": allocator.empty_cache,
        "get_device_properties": cuda.properties,
        "cudart": cuda.cudart,
        "check_error": _check_error,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "can_device_access_peer": lambda device, peer: False,
    }
    for name, call in calls.items():
        patch.setattr(torch.cuda, name, call)


def _check_error(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")


def _activate_in_threads(patch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    """Threads that the test starts play processes, each with its own default stream; the others belong to them."""
    start, run, test = threading.Thread.start, threading.Thread.run, threading.current_thread()
    homes: dict[threading.Thread, Any] = {}

    def start_there(thread: threading.Thread) -> None:
        if threading.current_thread() is not test:
            homes[thread] = cuda.timeline.default
        start(thread)

    def run_there(thread: threading.Thread) -> None:
        if thread in homes:
            cuda.timeline.join(homes[thread])
        torch._C._set_only_lift_cpu_tensors(True)
        with PretendMode(cuda):
            run(thread)

    patch.setattr(threading.Thread, "start", start_there)
    patch.setattr(threading.Thread, "run", run_there)


def _inner(value: Any) -> Any:
    """Return what a kernel sees of an argument: a tensor's memory, also of those in a list or tuple."""
    if isinstance(value, PretendTensor):
        return value.inner
    if isinstance(value, Tensor):
        raise ValueError("pointer argument cannot be accessed from a kernel: a tensor of the host")
    return type(value)(map(_inner, value)) if type(value) in (list, tuple) else value
