"""Between host and device without waiting: numbers of a step on their way up, its results on their way down.

Called once or twice per step by the batch's tensors and the sampler. On a CPU both are the tensors themselves.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

DEVICE_TIMEOUT_S = 60.0
_POLL_S = 50e-6


class DeviceError(RuntimeError):
    """The device has not finished a step in time. Nothing can be mended: the process ends."""


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors, all of one dtype, on device. One copy carries them all, and the host does not wait for it."""
    if device.type == "cpu":
        return list(tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class HostCopy:
    """Tensors of the device's current stream as they are now, on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrival: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def wait(self) -> list[Tensor]:
        """Return them on the host. Raise DeviceError when the device takes longer than any step may."""
        deadline = time.monotonic() + DEVICE_TIMEOUT_S
        while self._arrival is not None and not self._arrival.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                raise DeviceError(f"the device has not finished a step within {DEVICE_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        return self._tensors
