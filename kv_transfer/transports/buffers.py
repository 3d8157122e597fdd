"""Memory for payloads that is used again and again: what has just been mapped costs more to touch than to copy.

Used by the transports whose payloads lie in memory of their own. Pinned where a GPU copies from and to it.
"""

from collections import deque

import torch

from kv_transfer.plan import FRAME_BYTES

KEPT_BUFFERS = 16
"""Idle ones; whatever else comes back is let go of."""


class Buffers:
    """Each holds one frame of any size. take() and give_back() may be called by different threads."""

    def __init__(self, device: torch.device, is_pinned: bool = False) -> None:
        self._device = device
        self._is_pinned = is_pinned
        self._idle: deque[torch.Tensor] = deque(maxlen=KEPT_BUFFERS)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return memory for a payload, uint8 [num_bytes]; nobody else has it until it is given back."""
        try:
            buffer = self._idle.pop()  # last in, first out: the warmest memory first
        except IndexError:
            buffer = torch.empty(FRAME_BYTES, dtype=torch.uint8, device=self._device, pin_memory=self._is_pinned)
        return buffer[:num_bytes]

    def give_back(self, payload: torch.Tensor) -> None:
        """Nobody reads or writes this payload any more. One that lies in memory of another size is not kept."""
        if payload.untyped_storage().nbytes() == FRAME_BYTES:
            self._idle.append(payload.as_strided((FRAME_BYTES,), (1,), 0))


def host_buffers(device: torch.device) -> Buffers:
    """Return buffers in the host's memory, for payloads of a cache on device."""
    return Buffers(torch.device("cpu"), is_pinned=device.type == "cuda")
