"""What joins the GPUs of two ranks of one process: NCCL's communicators, and memory that one opens of the other."""

import threading
import time
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import Store

from kernels.process_group import open_group
from kv_transfer.transports import device_memory, torch_transports
from kv_transfer.transports.communicator import RECEIVER, SENDER, finish
from tests.pretend_cuda.tensor import PretendTensor

HOST = "127.0.0.1"
_POLL_S = 1e-4


class PretendNccl:
    """A Communicator on a stream of its own that nothing else waits for; gloo carries what lies in the memory then."""

    def __init__(self, store: Store, rank: int, device: torch.device, timeout_s: float) -> None:
        self._group = open_group(store, rank, 2, HOST, "cpu", 60)
        self._stream = torch.cuda.Stream(device)
        self._timeout_s = timeout_s

    def send(self, payload: torch.Tensor) -> None:
        self._finish(lambda inner: self._group.send([inner], RECEIVER, 0), payload)

    def receive(self, payload: torch.Tensor) -> None:
        self._finish(lambda inner: self._group.recv([inner], SENDER, 0), payload)

    def abort(self) -> None:
        self._group.abort()

    def _finish(self, start: Any, payload: torch.Tensor) -> None:
        assert isinstance(payload, PretendTensor), "NCCL takes a GPU's memory only"
        with torch.cuda.stream(self._stream):
            event = torch.cuda.Event()
            event.record()
        while not event.query():
            time.sleep(_POLL_S)
        finish(_Running(start(payload.inner)), self._timeout_s, self.abort)  # type: ignore[arg-type]


class _Running:
    """The part of torch's Work that NCCL has."""

    def __init__(self, work: Any) -> None:
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


def join_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks of one process use nccl and cuda_ipc between one another."""
    described: dict[bytes, PretendTensor] = {}

    def describe(memory: PretendTensor) -> bytes:
        key = len(described).to_bytes(4, "little")
        described[key] = memory
        return key

    def opened(description: bytes, num_bytes: int, device: torch.device) -> torch.Tensor:
        memory = described[description]
        return PretendTensor(memory.inner[:num_bytes], _Elsewhere(), memory.machine)  # type: ignore[arg-type]

    monkeypatch.setattr(device_memory, "describe", describe)
    monkeypatch.setattr(device_memory, "opened", opened)
    monkeypatch.setattr(torch_transports, "NcclCommunicator", PretendNccl)


class _Elsewhere:
    """Memory of another process, which alone knows when it may be used again."""

    def __init__(self) -> None:
        self.users: set[Any] = set()
