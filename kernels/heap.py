"""How this process's C heap treats what tensors let go of. Called by a worker that computes on a CPU, at its start."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 30
_LARGEST_KEPT_BYTES = 32 << 20  # glibc takes no more


def keep_freed_memory() -> bool:
    """Let malloc keep up to 1 GiB of freed memory for the next tensors; return whether it does, as glibc's can.

    By default it gives large pieces back to the system, which hands them out again page by page, each one zeroed: in a
    prefill that took a quarter of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
