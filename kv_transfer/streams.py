"""What kv_transfer needs of a GPU's streams: work beside the forward passes, and to know when something is over.

Used by staging.py for caches on a GPU. The main thread computes on its current stream, and whatever reads or writes the
cache is launched there too: so it comes after the step that filled the blocks and before any that reuses them.
"""

import queue
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from kv_transfer import threads

ResultT = TypeVar("ResultT")

Wait = Callable[[], None]
"""Returns when something is over on the GPU; may be called by any thread."""


class Streams(Protocol):
    """One device's streams. aside() and mark() are the main thread's, alone() is any other's."""

    def aside(self, work: Callable[[], None], *tensors: torch.Tensor) -> Wait:
        """Launch work beside the main stream, after what was launched there so far; tensors are all that it reads."""
        ...

    def mark(self, *tensors: torch.Tensor) -> Wait:
        """Return what waits for everything launched so far on the main stream, which reads tensors of other streams."""
        ...

    def alone(self, work: Callable[[], ResultT]) -> ResultT:
        """Run work on a stream of its own, independent of all others, and wait for its end."""
        ...


class CudaStreams:
    """Streams of one NVIDIA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = new_stream(device)
        self._checks = new_stream(device)

    def aside(self, work: Callable[[], None], *tensors: torch.Tensor) -> Wait:
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            work()
            for tensor in tensors:
                tensor.record_stream(self._copies)
            return self._event(self._copies).synchronize

    def mark(self, *tensors: torch.Tensor) -> Wait:
        stream = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            tensor.record_stream(stream)
        return self._event(stream).synchronize

    def alone(self, work: Callable[[], ResultT]) -> ResultT:
        with torch.cuda.stream(self._checks):
            result = work()
            self._event(self._checks).synchronize()
        return result

    @staticmethod
    def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
        # A thread that waits for it sleeps: the main thread needs the core.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that runs beside all others of device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Afterwards:
    """A thread that calls back when something is over on the GPU, in the order in which it was asked to."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Wait, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threads.start("kv-afterwards", self._run)

    def call(self, wait: Wait, callback: Callable[[], None]) -> None:
        self._queue.put((wait, callback))

    def close(self) -> None:
        """Return when everything asked for so far has been called, or the device hangs."""
        self._queue.put(None)
        threads.has_ended(self._thread)

    def _run(self) -> None:
        while item := self._queue.get():
            wait, callback = item
            wait()
            callback()
