"""xxh3_kv in Python: one XXH3 digest of 64 bits (Collet) for each unit of a payload in the host's memory.

Called by kv_transfer where payloads are gathered and where they have arrived; see docs/decisions/0006-digests.md.
"""

from collections.abc import Iterable
from typing import Any

import torch
import xxhash


def xxh3_kv(payload: torch.Tensor, row_bytes: int, unit_bytes: int) -> bytes:
    """Return the digests of all units, 8 bytes each, most significant first.

    payload: uint8 [num_rows * row_bytes]. Each row is cut into units of unit_bytes; its last one may be shorter.
    """
    units: Iterable[Any]
    if row_bytes % unit_bytes == 0:  # NumPy cuts twice as fast as slices
        units = payload.numpy().reshape(-1, unit_bytes)
    else:
        starts = range(0, row_bytes, unit_bytes)
        units = (row[start : start + unit_bytes] for row in payload.numpy().reshape(-1, row_bytes) for start in starts)
    return b"".join(map(xxhash.xxh3_64_digest, units))
