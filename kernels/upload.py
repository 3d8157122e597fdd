"""Numbers of the host on their way to a device, which nobody waits for.

Called by the engine for every step and by kv_transfer for every block table. torch.tensor(..., device=...) would do the
same after waiting for all that the device was told to do before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors, all of one dtype, on device: on a CPU themselves. One copy carries them all."""
    if device.type == "cpu":
        return list(tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = torch.split(packed, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
