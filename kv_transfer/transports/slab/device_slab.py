"""A GPU's memory that one sending and one receiving rank of one host share; see slab.py.

Memory of a GPU must not be used for anything else while another process may still read it, and unlike a file's it does
not go with its last user. So a slab is lent with a lifeline: one end of a pipe, which ends when the receiver has let go
of the slab or has died, and not before. Slabs that were given up wait for that, and are then lent again.
"""

import os
import select
import weakref

import torch

from kv_transfer.plan import FRAME_BYTES
from kv_transfer.transports.slab import device_memory
from kv_transfer.transports.slab.host_slab import NUM_SLOTS, Lent, OwnSlab, Slab
from kv_transfer.transports.transport import OutgoingFrame


class DeviceSlabs:
    """All slabs of one sending rank. Its memory is bounded by the most receivers that it ever had at one time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given_up: list[tuple[torch.Tensor, int]] = []  # memory, and what its receiver holds the other end of

    def new(self) -> "DeviceSlab":
        """Return a slab that nobody else reads."""
        idle = self._idle()
        return DeviceSlab(self._fresh() if idle is None else idle, self)

    def give_up(self, memory: torch.Tensor, lifeline: int) -> None:
        """Keep memory until its receiver has let go of it."""
        self._given_up.append((memory, lifeline))

    def _fresh(self) -> torch.Tensor:
        return torch.empty(NUM_SLOTS * FRAME_BYTES, dtype=torch.uint8, device=self._device)

    def _idle(self) -> torch.Tensor | None:
        for index, (memory, lifeline) in enumerate(self._given_up):
            if has_ended(lifeline):
                os.close(lifeline)
                del self._given_up[index]
                return memory
        return None


class DeviceSlab(OwnSlab):
    """The sender's end."""

    def __init__(self, memory: torch.Tensor, slabs: DeviceSlabs) -> None:
        super().__init__(memory)
        self._slabs = slabs
        self._lifeline, self._others_end = os.pipe2(os.O_CLOEXEC)
        self._is_lent = False

    def lend(self) -> Lent:
        assert not self._is_lent, "a slab is lent once"
        self._is_lent = True
        return Lent(device_memory.describe(self.memory), self._others_end)

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        """Of memory that others get as soon as the receiver lets go of it."""
        whole = frame.sealed()
        copy = whole.payload.clone()
        torch.cuda.current_stream(copy.device).synchronize()
        return whole._replace(payload=copy)

    def close(self) -> None:
        if not self._is_lent:
            os.close(self._others_end)
        self._slabs.give_up(self.memory, self._lifeline)


class _LentSlab(Slab):
    """The receiver's end; whoever answers for one of its slots holds on to it."""

    def __init__(self, memory: torch.Tensor, lifeline: int) -> None:
        super().__init__(memory)
        weakref.finalize(self, os.close, lifeline)


def open_device_slab(lent: Lent, device: torch.device) -> Slab:
    """Return the receiver's end. Raises ValueError for what is no slab, OSError when device cannot reach it."""
    try:
        memory = device_memory.opened(lent.description, NUM_SLOTS * FRAME_BYTES, device)
    except RuntimeError as error:
        raise OSError(f"the sender's GPU memory cannot be opened: {error}") from error
    return _LentSlab(memory, os.dup(lent.fd))


def has_ended(lifeline: int) -> bool:
    """Return whether nobody holds the other end any more."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    return bool(poll.poll(0))
