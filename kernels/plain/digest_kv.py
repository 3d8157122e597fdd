"""digest_kv in plain torch: one 64-bit digest for each unit of a gathered payload.

Called by kv_transfer where payloads are on a GPU, and wherever one that was digested there must be checked. The digest
is START plus the sum of all 32-bit words of a unit, each times a 64-bit odd key of its place, modulo 2^64: multilinear
hashing (Carter and Wegman, 1981) with published keys. It finds damage, it does not stop a forger; what it is certain to
find is said in docs/decisions/0006-digests.md.
"""

from functools import cache

import torch
from torch.nn.functional import pad

WORD_BYTES = 4
START = 0x243F6A8885A308D3
"""The digest of nothing but zeros: pi's first bits, so that memory never written does not look sound."""

_MASK = (1 << 64) - 1


def digest_kv(payload: torch.Tensor, row_bytes: int, unit_bytes: int) -> torch.Tensor:
    """Return the digests of all units, int64 [num_rows * units of a row], on the payload's device.

    payload: uint8 [num_rows * row_bytes]. Each row is cut into units of unit_bytes; its last one may be shorter. All
    sizes are multiples of WORD_BYTES.
    """
    num_units = -(-row_bytes // unit_bytes)
    rows = payload.view(torch.int32).view(-1, row_bytes // WORD_BYTES).to(torch.int64) & 0xFFFFFFFF
    words = pad(rows, (0, (num_units * unit_bytes - row_bytes) // WORD_BYTES))  # a word that is zero adds nothing
    units = words.view(-1, unit_bytes // WORD_BYTES)  # [num_rows * num_units, words of a unit]
    return (units * digest_keys(units.shape[1], payload.device)).sum(dim=1) + START


@cache
def digest_keys(num_words: int, device: torch.device) -> torch.Tensor:
    """Return the keys of the first num_words places of a unit, int64 [num_words], all odd."""
    keys = [_split_mix(index) | 1 for index in range(1, num_words + 1)]
    return torch.tensor([key - (key >> 63 << 64) for key in keys], dtype=torch.int64, device=device)


def _split_mix(index: int) -> int:
    """Return the index-th number of SplitMix64 (Steele, Lea and Flood, 2014), seeded with START."""
    bits = (START + index * 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & _MASK
    return bits ^ bits >> 31
