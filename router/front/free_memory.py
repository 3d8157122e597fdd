"""Memory that was needed for a moment goes back to the machine. For router/__main__.py and text.py.

The C library keeps what is freed for the next need: after bodies and texts of mebibytes, hundreds of them.
"""

import ctypes
import sys

M_MMAP_THRESHOLD = -3
APART_BYTES = 128 << 10


def keep_large_blocks_apart() -> None:
    """From now on, let blocks of this size have pages of their own, which go when they are freed.

    The C library begins like that, but stops doing so for ever larger blocks as such blocks are freed.
    """
    _call("mallopt", M_MMAP_THRESHOLD, APART_BYTES)


def return_free_memory() -> None:
    """Give back whole pages between small blocks."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    """Both are glibc's; other libraries keep less."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
