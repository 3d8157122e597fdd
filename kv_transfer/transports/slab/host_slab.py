"""Memory that one sending and one receiving rank share: slots that the sender fills and the receiver gives back.

Slab is what both ends see, OwnSlab what the sender adds to it. HostSlab is an anonymous file of the sender's (memfd):
it has no name that could be left behind, is gone with its last user, however that one ends, and is sealed, so that no
sender can take memory away under a reader. A GPU's is in device_slab.py. Used by sender.py and receiver.py.
"""

import fcntl
import mmap
import os
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from kv_transfer.plan import FRAME_BYTES
from kv_transfer.transports.transport import OutgoingFrame

NUM_SLOTS = 16
"""Each holds one frame of any size; of the host's memory, what no frame has touched is not allocated."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Lent(NamedTuple):
    """What a receiver needs to open a slab: a description, and a descriptor that whoever has this closes."""

    description: bytes
    fd: int


class Slab:
    """NUM_SLOTS slots of FRAME_BYTES in memory, uint8 [NUM_SLOTS * FRAME_BYTES]."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._first = memory.data_ptr()
        self._slots = memory.view(NUM_SLOTS, FRAME_BYTES).unbind()

    def slot(self, index: int, num_bytes: int) -> torch.Tensor:
        """Return the first num_bytes of a slot, uint8 [num_bytes]. Raises ValueError when there is no such place."""
        if not (0 <= index < NUM_SLOTS and 0 < num_bytes <= FRAME_BYTES):
            raise ValueError(f"no {num_bytes} bytes in slot {index}; there are {NUM_SLOTS} slots of {FRAME_BYTES}")
        slot = self._slots[index]
        return slot if num_bytes == FRAME_BYTES else slot[:num_bytes]

    def index_of(self, payload: torch.Tensor) -> int | None:
        """Return the slot in which payload begins, None when it lies elsewhere."""
        index = (payload.data_ptr() - self._first) // FRAME_BYTES
        return index if 0 <= index < NUM_SLOTS else None


class OwnSlab(Slab, ABC):
    """The sender's end. take() and give_back() may be called by different threads."""

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__(memory)
        self._free = list(range(NUM_SLOTS - 1, -1, -1))  # used last in, first out: the warmest memory first

    def take(self, num_bytes: int, spared: int = 0) -> torch.Tensor | None:
        """Return a free slot's first num_bytes, or None while no more than spared slots are free."""
        if len(self._free) <= spared:
            return None
        try:
            return self.slot(self._free.pop(), num_bytes)
        except IndexError:  # the other thread was faster
            return None

    def give_back(self, payload: torch.Tensor) -> None:
        """The slot of payload may be taken again; a payload from elsewhere is fine."""
        index = self.index_of(payload)
        if index is not None:
            self._free.append(index)

    @abstractmethod
    def lend(self) -> Lent:
        """Return what the receiver opens; called once."""

    @abstractmethod
    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        """Return a frame whose payload nothing will write over when this slab is given up."""

    @abstractmethod
    def close(self) -> None:
        """Give the slab up: it is never written again while its receiver may read it."""


class HostSlab(OwnSlab):
    """Of the host's memory, which stays until its last user lets go of it. Raises OSError when there is none."""

    def __init__(self) -> None:
        fd = os.memfd_create("kv-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fd: int | None = fd
        try:
            os.ftruncate(fd, NUM_SLOTS * FRAME_BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(_mapped(fd))
        except OSError:
            self.close()
            raise

    def lend(self) -> Lent:
        assert self._fd is not None, "a slab is lent once"
        fd, self._fd = self._fd, None
        return Lent(b"", fd)

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        return frame  # which holds on to the memory

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def open_host_slab(lent: Lent) -> Slab:
    """Return the receiver's end. Raises ValueError for what is no slab, OSError when it cannot be mapped."""
    num_bytes = NUM_SLOTS * FRAME_BYTES
    if fcntl.fcntl(lent.fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(lent.fd).st_size != num_bytes:
        raise ValueError(f"shared memory is not sealed or not of {num_bytes} bytes")
    return Slab(_mapped(lent.fd))


def _mapped(fd: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(fd, NUM_SLOTS * FRAME_BYTES), dtype=torch.uint8)
