"""A GPU's streams as a CPU can play them: nothing that was put beside the main stream happens before it is waited for.

So whoever sends a payload, or lets its memory be used again, without having waited finds it not filled or foreign.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

import kv_transfer.receiver
import kv_transfer.sender
from kv_transfer.staging import DeviceLanding, DeviceStaging
from kv_transfer.streams import Wait
from kv_transfer.transports import shm_receiver, torch_receiver, zmq_receiver

ResultT = TypeVar("ResultT")


class LazyStreams:
    """kv_transfer.streams.Streams of no device at all."""

    def aside(self, work: Callable[[], None], *tensors: torch.Tensor) -> Wait:
        lock, done = threading.Lock(), []

        def wait() -> None:
            with lock:
                if not done:
                    work()
                    done.append(True)

        return wait

    def mark(self, *tensors: torch.Tensor) -> Wait:
        return lambda: None

    def alone(self, work: Callable[[], ResultT]) -> ResultT:
        return work()


class CopyingStaging(DeviceStaging):
    """All staging is the host's, as that of zmq, gloo and shm: payloads are copied there beside the main stream."""

    def __init__(self, cache: torch.Tensor) -> None:
        super().__init__(cache, LazyStreams())

    def _is_here(self, staging: torch.Tensor) -> bool:
        return False


class DirectStaging(DeviceStaging):
    """All staging is the device's, as that of nccl and cuda_ipc."""

    def __init__(self, cache: torch.Tensor) -> None:
        super().__init__(cache, LazyStreams())


class CopyingLanding(DeviceLanding):
    """Payloads have to be brought to the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"), LazyStreams())

    def _bring(self, payload: torch.Tensor) -> torch.Tensor:
        return payload.clone()


class DirectLanding(DeviceLanding):
    """Payloads are there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"), LazyStreams())


def play_gpu(monkeypatch: pytest.MonkeyPatch, *, is_direct: bool, sides: str = "both") -> None:
    """Let every cache opened from now on be treated as one on a GPU; sides: "sender", "receiver" or "both"."""
    if sides != "receiver":
        monkeypatch.setattr(kv_transfer.sender, "staging_for", DirectStaging if is_direct else CopyingStaging)
    if sides != "sender":
        monkeypatch.setattr(kv_transfer.receiver, "staging_for", DirectStaging)
        for module in (zmq_receiver, shm_receiver, torch_receiver):
            monkeypatch.setattr(module, "landing_for", DirectLanding if is_direct else CopyingLanding)
