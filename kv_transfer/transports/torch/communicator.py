"""One pair of ranks' communicator over torch.distributed: payloads from one sender to one receiver, in order.

Owned by one thread on each side (sender.py, receiver.py). Gloo moves payloads of the host's memory, NCCL
those of a GPU. Sending and receiving end in time, with an error if need be; after one the communicator is aborted for
good. Opening does over gloo only: over NCCL it waits for the other end for as long as NCCL does, and a thread whose
other end dies just then may never end.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from kernels.process_group import open_fragile_group, open_group
from kv_transfer.streams import new_stream
from kv_transfer.transports.buffers import Buffers

SENDER, RECEIVER = 0, 1
"""Ranks within a pair's group."""

_PAYLOAD = 0  # tag
_POLL_S = 0.0001


class Communicator(Protocol):
    """One end. Raises RuntimeError, or what torch raises, when an operation fails or does not end in time."""

    def send(self, payload: torch.Tensor) -> None:
        """Send uint8 [num_bytes]; return when it may be overwritten."""
        ...

    def receive(self, payload: torch.Tensor) -> None:
        """Fill uint8 [num_bytes] with what the other end sends, which has as many bytes."""
        ...

    def abort(self) -> None:
        """Give up, also what is under way; nothing is read from or written to any payload afterwards."""
        ...


OpenCommunicator = Callable[[Store, int], Communicator]
"""Takes the store over which the pair meets, and this end's rank in it; waits for the other end to come.

Over gloo the wait has a deadline. Over NCCL nothing bounds it here, so call it only when the other end is on its way.
"""


class Backend(NamedTuple):
    """What makes gloo of a torch transport, or nccl: its name, its communicators, and where its payloads lie."""

    name: str
    open_communicator: OpenCommunicator
    buffers: Buffers


class GlooCommunicator:
    """Between hosts' memories. Listens on host only."""

    def __init__(self, store: Store, rank: int, host: str, timeout_s: float) -> None:
        self._group = open_group(store, rank, 2, host, "cpu", timeout_s)

    def send(self, payload: torch.Tensor) -> None:
        self._group.send([payload], RECEIVER, _PAYLOAD).wait()

    def receive(self, payload: torch.Tensor) -> None:
        self._group.recv([payload], SENDER, _PAYLOAD).wait()

    def abort(self) -> None:
        self._group.abort()


class NcclCommunicator:
    """Between GPUs, on a stream of its own: neither end's forward passes wait for it.

    timeout_s bounds sending and receiving, not opening.
    """

    def __init__(self, store: Store, rank: int, device: torch.device, timeout_s: float) -> None:
        self._group = open_fragile_group(store, rank, 2, device)
        self._stream = new_stream(device)
        self._timeout_s = timeout_s

    def send(self, payload: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            finish(self._group.send([payload], RECEIVER, _PAYLOAD), self._timeout_s, self.abort)

    def receive(self, payload: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            finish(self._group.recv([payload], SENDER, _PAYLOAD), self._timeout_s, self.abort)

    def abort(self) -> None:
        self._group.abort()


def finish(work: dist.Work, timeout_s: float, abort: Callable[[], None]) -> None:
    """Wait until an operation is over on the GPU; abort it when that takes longer than timeout_s, and raise.

    Waiting through torch would wait for nothing: an operation that is over for NCCL has only been queued.
    """
    give_up_at = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > give_up_at:
            abort()
            raise RuntimeError(f"the other end did nothing for {timeout_s:g} s")
        time.sleep(_POLL_S)
    error = work.exception()
    if error is not None:
        abort()
        raise RuntimeError(str(error))
