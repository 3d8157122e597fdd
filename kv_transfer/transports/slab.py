"""Shared memory of one sending and one receiving rank: slots that the sender fills and the receiver gives back.

An anonymous file of the sender's (memfd), passed through a socket: it has no name that could be left behind, and is
gone with its last user, however that one ends. Sealed, so that no sender can take memory away under a reader. Used by
shm_sender.py and shm_receiver.py.
"""

import fcntl
import mmap
import os

import torch

from kv_transfer.plan import FRAME_BYTES

NUM_SLOTS = 16
"""Each holds one frame of any size; memory that no frame has touched is not allocated."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Slab:
    """NUM_SLOTS slots of FRAME_BYTES, mapped from a file descriptor that the caller owns.

    Raises ValueError for a descriptor that is not a slab, OSError when it cannot be mapped.
    """

    def __init__(self, fd: int) -> None:
        num_bytes = NUM_SLOTS * FRAME_BYTES
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != num_bytes:
            raise ValueError(f"shared memory is not sealed or not of {num_bytes} bytes")
        self._memory = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)

    def slot(self, index: int, num_bytes: int) -> torch.Tensor:
        """Return the first num_bytes of a slot, uint8 [num_bytes]. Raises ValueError when there is no such place."""
        if not (0 <= index < NUM_SLOTS and 0 < num_bytes <= FRAME_BYTES):
            raise ValueError(f"no {num_bytes} bytes in slot {index}; there are {NUM_SLOTS} slots of {FRAME_BYTES}")
        return self._memory[index * FRAME_BYTES : index * FRAME_BYTES + num_bytes]

    def index_of(self, payload: torch.Tensor) -> int | None:
        """Return the slot in which payload begins, None when it lies elsewhere."""
        offset = payload.data_ptr() - self._memory.data_ptr()
        return offset // FRAME_BYTES if 0 <= offset < self._memory.numel() else None


class OwnSlab(Slab):
    """The sender's end. take() and give_back() may be called from different threads."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kv-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, NUM_SLOTS * FRAME_BYTES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(self.fd)
        except OSError:
            os.close(self.fd)
            raise
        self._free = list(range(NUM_SLOTS - 1, -1, -1))  # used last in, first out: the warmest memory first

    def take(self, num_bytes: int) -> torch.Tensor | None:
        """Return a free slot's first num_bytes, or None while there is none."""
        try:
            return self.slot(self._free.pop(), num_bytes)
        except IndexError:
            return None

    def give_back(self, payload: torch.Tensor) -> None:
        """The slot of payload may be taken again; a payload from elsewhere is fine."""
        index = self.index_of(payload)
        if index is not None:
            self._free.append(index)

    def close(self) -> None:
        """Let go of the descriptor; memory stays until its last user lets go of it."""
        os.close(self.fd)
