"""What joins the GPUs of two ranks of one process: NCCL's communicators, and memory that one opens of the other."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

import engine.group
from kernels.process_group import open_group
from kv_transfer.transports.slab import device_memory
from kv_transfer.transports.torch import factories as torch_transports
from kv_transfer.transports.torch.communicator import RECEIVER, SENDER, finish
from tests.pretend_cuda.streams import Work
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

    def unpin(memory: torch.Tensor) -> None:
        """The device may be no more when a slab is let go of."""

    monkeypatch.setattr(device_memory, "_unpin", unpin)
    monkeypatch.setattr(device_memory, "describe", describe)
    monkeypatch.setattr(device_memory, "opened", opened)
    monkeypatch.setattr(torch_transports, "NcclCommunicator", PretendNccl)


class PretendGroup:
    """One rank's end of a group over NCCL: its part in a collective is work on its stream, whenever that is done."""

    def __init__(self, meeting: "_Meeting", rank: int) -> None:
        self._meeting = meeting
        self._rank = rank

    def allreduce(self, tensors: list[PretendTensor], options: Any = None) -> Any:
        is_least = options is not None and options.reduceOp == dist.ReduceOp.MIN
        [tensor] = tensors
        inner = tensor.inner

        def reduce(parts: list[torch.Tensor]) -> None:
            stacked = torch.stack(parts)
            inner.copy_(stacked.amin(dim=0) if is_least else stacked.sum(dim=0))

        return self._meet(tensor, reduce)

    def broadcast(self, tensors: list[PretendTensor]) -> Any:
        inner = tensors[0].inner
        return self._meet(tensors[0], lambda parts: inner.copy_(parts[0]))

    def gather(self, outputs: list[list[PretendTensor]], tensors: list[PretendTensor], options: Any) -> Any:
        inners = [output.inner for output in outputs[0]] if outputs else []

        def receive(parts: list[torch.Tensor]) -> None:
            for inner, part in zip(inners, parts, strict=False):
                inner.copy_(part)

        return self._meet(tensors[0], receive)

    def _meet(self, tensor: PretendTensor, use: Callable[[list[torch.Tensor]], object]) -> Any:
        timeline, meeting, rank, inner = tensor.machine.timeline, self._meeting, self._rank, tensor.inner
        stream = timeline.current_stream()
        timeline.queue(Work(lambda: meeting.given[rank].append(inner.clone())), stream)
        timeline.queue(Work(lambda: use(meeting.take(rank)), _AllGiven(meeting, rank)), stream)
        return SimpleNamespace(wait=lambda: None)


class _Meeting:
    """What the ranks of one group have given to each of its collectives, and how many each has gone away with."""

    def __init__(self, size: int) -> None:
        self.given: list[list[torch.Tensor]] = [[] for _ in range(size)]
        self.num_taken = [0] * size

    def take(self, rank: int) -> list[torch.Tensor]:
        index = self.num_taken[rank]
        self.num_taken[rank] += 1
        return [given[index] for given in self.given]


class _AllGiven(NamedTuple):
    """That all have come to a rank's next collective."""

    meeting: _Meeting
    rank: int

    @property
    def is_reached(self) -> bool:
        return min(map(len, self.meeting.given)) > self.meeting.num_taken[self.rank]


def join_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks of a tensor-parallel group, threads of one process, have their collectives."""
    meetings: dict[int, _Meeting] = {}

    def open_group(store: Any, rank: int, size: int, *_: object) -> PretendGroup:
        return PretendGroup(meetings.setdefault(store.port, _Meeting(size)), rank)

    monkeypatch.setattr(engine.group, "open_group", open_group)


class _Elsewhere:
    """Memory of another process, which alone knows when it may be used again."""

    def __init__(self) -> None:
        self.users: set[Any] = set()
