"""How long calls take on a device, and what the device can do at best: copy bandwidth and matrix products.

Used by the engine's benchmark. On a GPU calls are captured in one CUDA graph and replayed, so that launching them from
Python is not what is measured. Calls should come in several copies over data of their own: a cache that still holds the
last call's data would serve the next one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceiling:
    """What a device reaches: bytes read plus bytes written per second in a copy, operations per second in a product."""

    bytes_per_s: float
    flops_per_s: float


def seconds(calls: Sequence[Call], device: torch.device, repeats: int = 10) -> float:
    """Return the time of one call: the mean over calls, the median over repeats."""
    for call in calls:
        call()
    return (_seconds_on_gpu if device.type == "cuda" else _seconds_on_cpu)(calls, repeats) / len(calls)


def seconds_of_first(call: Call, device: torch.device) -> float:
    """Return the time of this one call as the host sees it, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def ceiling(device: torch.device, dtype: torch.dtype, num_elements: int, matrix: int) -> Ceiling:
    """Measure with tensors of num_elements, and with products of square matrices."""
    sources = [torch.randn(num_elements, device=device).to(dtype) for _ in range(2)]
    targets = [torch.empty_like(source) for source in sources]
    copies: list[Call] = [
        lambda source=source, target=target: target.copy_(source)
        for source, target in zip(sources, targets, strict=True)
    ]
    a, b = torch.randn(2, matrix, matrix, device=device).to(dtype)
    return Ceiling(
        bytes_per_s=2 * num_elements * dtype.itemsize / seconds(copies, device),
        flops_per_s=2 * matrix**3 / seconds([lambda: a @ b], device),
    )


def _seconds_on_cpu(calls: Sequence[Call], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _seconds_on_gpu(calls: Sequence[Call], repeats: int) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3
