"""One XXH3 digest for each unit of a payload in the host's memory, without a call of Python per unit.

Called by kv_transfer, on any thread. The hash itself is the xxhash package's: its extension module exports the C
function, and the loop over units is given its address.
"""

import ctypes
from functools import cache

import xxhash._xxhash
from torch import Tensor

from kernels.native.library import function
from kernels.plain import xxh3_kv as plain

_DIGEST_BYTES = 8
_HASHES = ("XXH3_64bits_dispatch", "XXH3_64bits")
"""The one that looks at what the processor can do, where there is one, and the one for every processor."""


def xxh3_kv(payload: Tensor, row_bytes: int, unit_bytes: int) -> bytes:
    """Return the digests of all units, 8 bytes each; as kernels/plain/xxh3_kv.py."""
    run, xxh3 = function("xxh3_kv", "pppiii"), _xxh3()
    if run is None or xxh3 is None:
        return plain.xxh3_kv(payload, row_bytes, unit_bytes)
    assert payload.is_contiguous()
    num_rows = payload.numel() // row_bytes
    digests = ctypes.create_string_buffer(num_rows * -(-row_bytes // unit_bytes) * _DIGEST_BYTES)
    run(payload.data_ptr(), ctypes.addressof(digests), xxh3, num_rows, row_bytes, unit_bytes)
    return digests.raw


@cache
def _xxh3() -> int | None:
    """Return the address of the hash; None where the package was built without showing it."""
    exported = ctypes.CDLL(xxhash._xxhash.__file__)
    found = next((name for name in _HASHES if hasattr(exported, name)), None)
    return ctypes.cast(exported[found], ctypes.c_void_p).value if found else None
