"""One 64-bit digest for each unit of a gathered payload, read once.

Called by kv_transfer right after the gather, when the payload is still in the GPU's cache, and again where it arrives.
Units are a few KiB, so each is one program's row; the keys are the same for all and come from the cache too.
"""

import triton
import triton.language as tl
from torch import Tensor, int32, int64

from kernels.plain.digest_kv import START, WORD_BYTES, digest_keys
from kernels.triton.configurations import DIGEST


def digest_kv(payload: Tensor, row_bytes: int, unit_bytes: int) -> Tensor:
    """Return the digests of all units, int64 [num_rows * units of a row]; as kernels/plain/digest_kv.py."""
    words = payload.view(int32)
    row_words, unit_words = row_bytes // WORD_BYTES, unit_bytes // WORD_BYTES
    units_per_row = triton.cdiv(row_words, unit_words)
    num_units = len(words) // row_words * units_per_row
    digests = words.new_empty(num_units, dtype=int64)
    _digest_kv[(triton.cdiv(num_units, DIGEST.rows),)](
        words,
        digest_keys(unit_words, payload.device),
        digests,
        num_units,
        row_words,
        units_per_row,
        START=START,
        UNIT_WORDS=unit_words,
        UNITS=DIGEST.rows,
        WORDS=DIGEST.tile,
        **DIGEST.launch,
    )
    return digests


@triton.jit(do_not_specialize=["num_units", "row_words", "units_per_row"], do_not_specialize_on_alignment=["words"])
def _digest_kv(
    words,  # int32 [num_rows, row_words]
    keys,  # int64 [UNIT_WORDS]
    digests,  # int64 [num_units]
    num_units,
    row_words,
    units_per_row,
    START: tl.constexpr,
    UNIT_WORDS: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    first = unit % units_per_row * UNIT_WORDS  # word of its row
    length = tl.minimum(row_words - first, UNIT_WORDS)
    start = (unit // units_per_row).to(tl.int64) * row_words + first
    is_unit = unit < num_units
    sums = tl.full([UNITS], START, tl.int64)
    for offset in range(0, UNIT_WORDS, WORDS):
        place = offset + tl.arange(0, WORDS)
        is_word = is_unit[:, None] & (place[None, :] < length[:, None])
        found = tl.load(words + start[:, None] + place[None, :], mask=is_word, other=0)
        key = tl.load(keys + place, mask=place < UNIT_WORDS, other=0)
        sums += tl.sum((found.to(tl.int64) & 0xFFFFFFFF) * key[None, :], axis=1)
    tl.store(digests + unit, sums, mask=is_unit)
