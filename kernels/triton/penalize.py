"""Repetition, frequency and presence penalties on the tokens that a text holds already. Called by the sampler.

One pass over the rows concerned, rounding as kernels/plain/penalize.py does.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.configurations import PENALIZE


def penalize(
    logits: Tensor,
    rows: Tensor,
    texts: Tensor,
    in_output: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalize some rows of logits [num_rows, vocab_size] in place; arguments as in kernels/plain/penalize.py."""
    assert logits.stride(1) == 1
    num_penalized, vocab_size = rows.shape[0], logits.shape[1]
    tables = (in_output.contiguous(), in_prompt.contiguous())
    factors = (factor.contiguous() for factor in (repetition, frequency, presence))
    _penalize[num_penalized, triton.cdiv(vocab_size, PENALIZE.tile)](
        logits,
        rows.contiguous(),
        texts.contiguous(),
        *tables,
        *factors,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        TILE=PENALIZE.tile,
        **PENALIZE.launch,
    )


@triton.jit(
    do_not_specialize=["row_stride"],
    do_not_specialize_on_alignment=["logits", "rows", "texts", "repetition", "frequency", "presence"],
)
def _penalize(
    logits,  # float32 [num_rows, VOCAB_SIZE], rows row_stride apart
    rows,  # int64 [num_penalized]
    texts,  # int64 [num_penalized]
    in_output,  # int32 [num_texts, VOCAB_SIZE]
    in_prompt,  # bool [num_texts, VOCAB_SIZE]
    repetition,  # float32 [num_penalized]
    frequency,  # float32 [num_penalized]
    presence,  # float32 [num_penalized]
    row_stride,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Penalize one tile of one row."""
    index = tl.program_id(0)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = ids < VOCAB_SIZE
    place = logits + tl.load(rows + index) * row_stride + ids
    text = tl.load(texts + index) * VOCAB_SIZE + ids
    count = tl.load(in_output + text, mask=mask, other=0)
    is_held = (count > 0) | (tl.load(in_prompt + text, mask=mask, other=0) != 0)
    logit = tl.load(place, mask=mask, other=0.0)
    factor = tl.where(is_held, tl.load(repetition + index), 1.0)
    logit = tl.where(logit > 0, tl.div_rn(logit, factor), logit * factor)
    logit = logit - tl.load(frequency + index) * count.to(tl.float32)
    logit = logit - tl.load(presence + index) * (count > 0).to(tl.float32)
    tl.store(place, logit, mask=mask)
