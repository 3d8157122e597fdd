"""A step's results on their way to the host, without waiting until they are asked for. Used by the sampler.

On a CPU they are the tensors themselves. The other way is kernels/upload.py.
"""

import time

import torch
from torch import Tensor

from protocol.errors import DeviceError

DEVICE_TIMEOUT_S = 60.0
_POLL_S = 50e-6


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
