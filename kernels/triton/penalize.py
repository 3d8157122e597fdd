"""Repetition, frequency and presence penalties on the tokens that a text holds already. Called by the sampler.

One pass over the (row, token) pairs concerned, rounding as kernels/plain/penalize.py does.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import PENALIZE


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalize logits [num_rows, vocab_size] in place; arguments as in kernels/plain/penalize.py."""
    assert logits.stride(1) == 1
    num_pairs = rows.shape[0]
    pairs = (x.contiguous() for x in (rows, token_ids, output_counts, repetition, frequency, presence))
    _penalize[(triton.cdiv(num_pairs, PENALIZE.tile),)](
        logits,
        *pairs,
        logits.stride(0),
        num_pairs,
        TILE=PENALIZE.tile,
        **PENALIZE.launch,
    )


@triton.jit(
    do_not_specialize=["row_stride", "num_pairs"],
    do_not_specialize_on_alignment=["logits", "rows", "token_ids", "output_counts"],
)
def _penalize(
    logits,  # float32 [num_rows, vocab_size], rows row_stride apart
    rows,  # int64 [num_pairs]
    token_ids,  # int64 [num_pairs]
    output_counts,  # int64 [num_pairs]
    repetition,  # float32 [num_rows]
    frequency,  # float32 [num_rows]
    presence,  # float32 [num_rows]
    row_stride,
    num_pairs,
    TILE: tl.constexpr,
):
    pair = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = pair < num_pairs
    row = tl.load(rows + pair, mask=mask, other=0)
    place = logits + row * row_stride + tl.load(token_ids + pair, mask=mask, other=0)
    count = tl.load(output_counts + pair, mask=mask, other=0)
    logit = tl.load(place, mask=mask, other=0.0)
    factor = tl.load(repetition + row, mask=mask, other=1.0)
    logit = tl.where(logit > 0, tl.div_rn(logit, factor), logit * factor)
    per_use = tl.load(frequency + row, mask=mask, other=0.0) * count.to(tl.float32)
    logit = logit - per_use - tl.load(presence + row, mask=mask, other=0.0) * (count > 0).to(tl.float32)
    tl.store(place, logit, mask=mask)
