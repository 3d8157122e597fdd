"""A GPU as a CPU can play it: nothing that was put beside the main stream happens before it is waited for.

So whoever sends a payload, or lets its memory be used again, without having waited finds it not filled or foreign. The
calls of CUDA and NCCL themselves are the only part of the nccl and cuda_ipc transports that is not run so.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

import kv_transfer.receiver
import kv_transfer.sender
from kernels.process_group import open_group
from kv_transfer.staging import DeviceLanding, DeviceStaging
from kv_transfer.streams import Wait
from kv_transfer.transports import (
    device_memory,
    slab_receiver,
    slab_transports,
    torch_receiver,
    torch_transports,
    zmq_receiver,
)
from kv_transfer.transports.communicator import RECEIVER, SENDER, finish
from tests.integration.kv_groups import HOST

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


class GlooAsNccl:
    """A Communicator whose operations are over when they say so, as NCCL's, and move payloads through gloo."""

    def __init__(self, store: Store, rank: int, device: torch.device, timeout_s: float) -> None:
        self._group = open_group(store, rank, 2, HOST, "cpu", 60)
        self._timeout_s = timeout_s

    def send(self, payload: torch.Tensor) -> None:
        finish(_Running(self._group.send([payload], RECEIVER, 0)), self._timeout_s, self.abort)  # type: ignore[arg-type]

    def receive(self, payload: torch.Tensor) -> None:
        finish(_Running(self._group.recv([payload], SENDER, 0)), self._timeout_s, self.abort)  # type: ignore[arg-type]

    def abort(self) -> None:
        self._group.abort()


class _Running:
    """The part of torch's Work that NCCL has."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def exception(self) -> Exception | None:
        return self._error


def share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two ranks of one process open one another's memory, as two processes do with a GPU's."""
    described: dict[bytes, torch.Tensor] = {}

    def describe(memory: torch.Tensor) -> bytes:
        key = len(described).to_bytes(4, "little")
        described[key] = memory
        return key

    def opened(description: bytes, num_bytes: int, device: torch.device) -> torch.Tensor:
        memory = described.get(description)
        if memory is None:
            raise ValueError("not a description")
        return memory[:num_bytes]

    monkeypatch.setattr(device_memory, "describe", describe)
    monkeypatch.setattr(device_memory, "opened", opened)
    monkeypatch.setattr(slab_transports, "gpu_name", lambda device: "GPU-0")
    monkeypatch.setattr(slab_transports, "reachable_gpus", lambda device: frozenset(["GPU-0"]))


def play_gpu(monkeypatch: pytest.MonkeyPatch, *, is_direct: bool, sides: str = "both") -> None:
    """Let every cache opened from now on be treated as one on a GPU; sides: "sender", "receiver" or "both"."""
    if sides != "receiver":
        monkeypatch.setattr(kv_transfer.sender, "staging_for", DirectStaging if is_direct else CopyingStaging)
    if sides != "sender":
        monkeypatch.setattr(kv_transfer.receiver, "staging_for", DirectStaging)
        for module in (zmq_receiver, slab_receiver, torch_receiver):
            monkeypatch.setattr(module, "landing_for", DirectLanding if is_direct else CopyingLanding)
    monkeypatch.setattr(torch_transports, "NcclCommunicator", GlooAsNccl)
    share_memory(monkeypatch)
