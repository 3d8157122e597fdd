"""Philox4x32-10, a counter-based random generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

Called by sampling. Having no state, it gives the same numbers to the same key and counter on every worker. 32-bit
words are kept in int64 tensors, because torch has little arithmetic on unsigned integers.
"""

import torch
from torch import Tensor

WORD_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Return four random 32-bit words per counter: int64 [..., 4], each in [0, 2^32).

    counter and key are words of the same kind, least significant first, of shapes that broadcast to [...].
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & WORD_MASK, (k1 + _KEY_STEPS[1]) & WORD_MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of the product; that its sign bit may be set as int64 does no harm."""
    product = word * multiplier
    return (product >> 32) & WORD_MASK, product & WORD_MASK
