"""Where tensors lie in the host's memory. Called by workers that compute on a CPU, at their start and for weights."""

import ctypes
import mmap

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 30
_LARGEST_KEPT_BYTES = 32 << 20  # glibc takes no more
_HUGE_PAGE_BYTES = 2 << 20


def keep_freed_memory() -> bool:
    """Let malloc keep up to 1 GiB of freed memory for the next tensors; return whether it does, as glibc's can.

    By default it gives large pieces back to the system, which hands them out again page by page, each one zeroed: in a
    prefill that took a quarter of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))


def on_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor of the host's in pages of 2 MiB, where the system has them; else tensor itself.

    A large matrix that is read from end to end is read up to a quarter faster so: the processor looks up where a page
    is five hundred times less often.
    """
    num_bytes = tensor.numel() * tensor.itemsize
    if num_bytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    area = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES)  # what stays untouched costs nothing
    try:
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return tensor
    room = torch.frombuffer(area, dtype=torch.uint8)
    start = -room.data_ptr() % _HUGE_PAGE_BYTES
    return room[start : start + num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
