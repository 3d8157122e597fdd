"""Memory for payloads that is used again and again: what has just been mapped costs more to touch than to copy.

Used by the transports whose payloads lie in memory of their own. Pinned where a GPU copies from and to it.
"""

from collections import deque
from contextlib import nullcontext

import torch

from kv_transfer.plan import FRAME_BYTES
from kv_transfer.streams import new_stream

KEPT_BUFFERS = 16
"""Idle ones; whatever else comes back is let go of."""

_SMALL_BYTES = 64 << 10
"""What is no larger has memory of its own size: thousands of small payloads may wait for a main thread."""


class Buffers:
    """Each holds one frame of any size. take() and give_back() may be called by different threads."""

    def __init__(self, device: torch.device, is_pinned: bool = False) -> None:
        self._device = device
        self._is_pinned = is_pinned
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._idle: deque[torch.Tensor] = deque(maxlen=KEPT_BUFFERS)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return memory for a payload, uint8 [num_bytes]; nobody else has it until it is given back."""
        if num_bytes <= _SMALL_BYTES:
            return self._fresh(num_bytes)
        try:
            buffer = self._idle.pop()  # last in, first out: the warmest memory first
        except IndexError:
            buffer = self._fresh(FRAME_BYTES)
        return buffer[:num_bytes]

    def give_back(self, payload: torch.Tensor) -> None:
        """Nobody reads or writes this payload any more. One that lies in memory of another size is not kept."""
        if payload.untyped_storage().nbytes() == FRAME_BYTES:
            self._idle.append(payload.as_strided((FRAME_BYTES,), (1,), 0))

    def _fresh(self, num_bytes: int) -> torch.Tensor:
        """Return new memory, on a GPU of a stream that does nothing else.

        What the main stream has freed may be its own again at once, but it may not be done with it; and what arrives
        is written by another stream, which does not wait for the main one.
        """
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._is_pinned)


def host_buffers(device: torch.device) -> Buffers:
    """Return buffers in the host's memory, for payloads of a cache on device."""
    return Buffers(torch.device("cpu"), is_pinned=device.type == "cuda")
