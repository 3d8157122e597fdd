"""Drawing one token per row: temperature, then min-p, top-k and top-p, then the largest of logit plus Gumbel noise.

Called by the sampler for the rows that are not greedy. Draws what kernels/plain/sample.py draws, to the last token, as
long as no two floats that decide are closer than rounding; unlike it, never waits for the GPU and sorts nothing. A row
is described by its gaps, (largest logit - logit) / temperature, and all three filters by the largest gap they let pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.plain.sample import MASS_ONE, REACH
from kernels.triton.configurations import SAMPLE_DRAW, SAMPLE_FILTER, SAMPLE_FILTER_BITS


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Return the drawn token ids: int64 [num_rows]; arguments as in kernels/plain/sample.py."""
    assert logits.stride(1) == 1
    num_rows, vocab_size = logits.shape
    temperature = temperature.contiguous()
    largest = logits.amax(dim=-1)
    widest = torch.empty_like(largest)
    _find_widest_gap[(num_rows,)](
        logits,
        largest,
        temperature,
        *(x.contiguous() for x in (top_k, top_p, min_p)),
        widest,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        REACH=REACH,
        MASS_ONE=MASS_ONE,
        BITS=SAMPLE_FILTER_BITS,
        TILE=SAMPLE_FILTER.tile,
        **SAMPLE_FILTER.launch,
    )
    num_tiles = triton.cdiv(vocab_size, SAMPLE_DRAW.tile)
    scores = logits.new_empty((num_rows, num_tiles), dtype=torch.float64)
    token_ids = seeds.new_empty((num_rows, num_tiles))
    _draw_in_tile[num_rows, num_tiles](
        logits,
        largest,
        temperature,
        widest,
        *(x.contiguous() for x in (seeds, positions)),
        scores,
        token_ids,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        TILE=SAMPLE_DRAW.tile,
        **SAMPLE_DRAW.launch,
    )
    return token_ids.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)


@triton.jit
def _gaps(logits, ids, largest, temperature, VOCAB_SIZE: tl.constexpr):
    """Return how far each token is below the best one, infinity for forbidden ones and past the vocabulary."""
    values = tl.load(logits + ids, mask=ids < VOCAB_SIZE, other=float("-inf"))
    return tl.div_rn(largest - values, temperature)


@triton.jit(
    do_not_specialize=["row_stride"],
    do_not_specialize_on_alignment=["logits", "temperature", "top_k", "top_p", "min_p"],
)
def _find_widest_gap(
    logits,  # float32 [num_rows, VOCAB_SIZE], rows row_stride apart
    largest,  # float32 [num_rows]
    temperature,  # float32 [num_rows]
    top_k,  # int64 [num_rows]
    top_p,  # float32 [num_rows]
    min_p,  # float32 [num_rows]
    widest,  # float32 [num_rows], result
    row_stride,
    VOCAB_SIZE: tl.constexpr,
    REACH: tl.constexpr,
    MASS_ONE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the largest gap that a row's filters leave. Rows without top-k and top-p do not even read their logits."""
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * row_stride
    best, heat = tl.load(largest + row), tl.load(temperature + row)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    least = tl.maximum(tl.load(min_p + row).to(tl.float64), 1e-30)  # 0, for off, has no logarithm
    limit = tl.minimum(-tl.log(least), REACH).to(tl.float32)
    if k > 0:
        found = _widest_before(row_logits, best, heat, k, VOCAB_SIZE, 0, BITS, TILE)
        limit = tl.minimum(limit, found)
    if p < 1.0:
        total = tl.zeros([TILE], tl.int64)
        for first in range(0, VOCAB_SIZE, TILE):
            gaps = _gaps(row_logits, first + tl.arange(0, TILE), best, heat, VOCAB_SIZE)
            total += tl.where(gaps <= limit, _mass(gaps, MASS_ONE), 0)
        wanted = tl.maximum((p.to(tl.float64) * tl.sum(total).to(tl.float64)).to(tl.int64), 1)
        found = _widest_before(row_logits, best, heat, wanted, VOCAB_SIZE, MASS_ONE, BITS, TILE)
        limit = tl.minimum(limit, found)
    tl.store(widest + row, limit)


@triton.jit
def _mass(gaps, MASS_ONE: tl.constexpr):
    """Return exp(-gap) as an integer: sums of integers do not depend on the order of summing."""
    return (tl.exp(-gaps).to(tl.float64) * MASS_ONE).to(tl.int64)


@triton.jit
def _widest_before(
    logits,  # [VOCAB_SIZE], one row's
    largest,
    temperature,
    wanted,  # int64
    VOCAB_SIZE: tl.constexpr,
    MASS_ONE: tl.constexpr,  # what a token of gap 0 weighs; 0: every token weighs 1
    BITS: tl.constexpr,  # of the answer found in one pass
    TILE: tl.constexpr,
):
    """Return the largest gap before which the tokens of smaller gaps weigh less than wanted.

    Floats that are not negative are ordered as their bits are. So the bits of the answer are found from the top, some
    in each pass over the row: all their values are tried at once, and the last that holds is kept.
    """
    NUM_PASSES: tl.constexpr = (31 + BITS - 1) // BITS  # the sign bit is known
    choices = tl.arange(0, 1 << BITS).to(tl.int64)
    answer = wanted * 0
    for step in range(NUM_PASSES):
        shift = (NUM_PASSES - 1 - step) * BITS
        tried = answer + (choices << shift)  # [2 ** BITS]
        weight_before = tl.zeros([1 << BITS, TILE], tl.int64)
        for first in range(0, VOCAB_SIZE, TILE):
            gaps = _gaps(logits, first + tl.arange(0, TILE), largest, temperature, VOCAB_SIZE)
            weights = tl.full([TILE], 1, tl.int64) if MASS_ONE == 0 else _mass(gaps, MASS_ONE)
            is_before = gaps.to(tl.int32, bitcast=True)[None, :] < tried[:, None]
            weight_before += tl.where(is_before, weights[None, :], 0)
        holds = tl.sum(weight_before, axis=1) < wanted  # for the first, as nothing weighs less than nothing
        answer += (tl.sum(holds.to(tl.int64)) - 1) << shift
    return tl.minimum(answer, 0x7F800000).to(tl.int32).to(tl.float32, bitcast=True)  # all bits set would be no number


@triton.jit(
    do_not_specialize=["row_stride"],
    do_not_specialize_on_alignment=["logits", "temperature", "seeds", "positions"],
)
def _draw_in_tile(
    logits,  # float32 [num_rows, VOCAB_SIZE], rows row_stride apart
    largest,  # float32 [num_rows]
    temperature,  # float32 [num_rows]
    widest,  # float32 [num_rows], tokens of larger gaps are not drawn
    seeds,  # int64 [num_rows]
    positions,  # int64 [num_rows]
    scores,  # float64 [num_rows, num_tiles], result: the largest score of each tile
    token_ids,  # int64 [num_rows, num_tiles], result: whose it is
    row_stride,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Find the largest logit plus noise of one tile of the vocabulary."""
    row, tile = tl.program_id(0), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    row_logits = logits + row.to(tl.int64) * row_stride
    gaps = _gaps(row_logits, ids, tl.load(largest + row), tl.load(temperature + row), VOCAB_SIZE)
    is_kept = gaps <= tl.load(widest + row)
    result = row * tl.num_programs(1) + tile
    tl.store(scores + result, float("-inf"))
    tl.store(token_ids + result, tile * TILE)
    if tl.max(is_kept.to(tl.int32)) > 0:  # noise is costly: none where nothing may be drawn
        groups = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        noise = _gumbel_noise(tl.load(seeds + row), tl.load(positions + row), groups, TILE)
        total = tl.where(is_kept, noise - gaps.to(tl.float64), float("-inf"))
        best = tl.max(total)
        tl.store(scores + result, best)
        chosen = tl.min(tl.where(total == best, ids, VOCAB_SIZE - 1))  # a row of NaN names an id that exists, too
        tl.store(token_ids + result, chosen)


@triton.jit
def _gumbel_noise(seed, position, groups, TILE: tl.constexpr):
    """Return float64 [TILE] for the token ids of groups, int32 [TILE // 4]: four words of Philox serve four tokens."""
    zero = groups * 0
    low, high = zero + position.to(tl.int32), zero + (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, groups, low, high, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE])  # w0 w1 w2 w3 of the first group, and so on
    uniform = (words.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return -tl.log(-tl.log(1.0 - uniform))  # 1 - uniform is exact: 33 bits
