"""Drawing one token per row: temperature, then min-p, top-k and top-p, then the largest of logit plus Gumbel noise.

Called by the sampler for the rows that are not greedy. The noise of a token depends on the row's seed, the position
and the token id alone, and the filters compare a row only with itself, so a row's token does not depend on its batch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from kernels.plain.philox import WORD_MASK, philox_4x32

_WORDS = 4  # random words per counter, so one counter serves four neighbouring token ids
MASS_ONE = 1 << 40  # probability 1 as an integer: sums of integers do not depend on the order of summing
_FIRST_CANDIDATES = 1024
_LEAST_NOISE = -math.log(math.log(2.0**33))
_MOST_NOISE = math.log(2.0**33)
REACH = _MOST_NOISE - _LEAST_NOISE + 1.0  # a token this far below the best one can never be drawn


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Return the drawn token ids: int64 [num_rows].

    logits: float32 [num_rows, vocab_size]; -inf forbids a token
    temperature: float32 [num_rows], above 0; top_p, min_p: float32 [num_rows], off at 1 and 0
    top_k: int64 [num_rows], off at 0. Tokens that tie with the last one kept are kept
    seeds: int64 [num_rows], all 64 bits used; positions: int64 [num_rows], the draw's number within its request
    """
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    scaled = scaled.masked_fill(scaled < _lowest_kept(scaled, top_k, min_p).unsqueeze(1), -math.inf)
    if bool((top_p < 1).any()):
        scaled = _filter_top_p(scaled, top_p)
    return _largest_with_noise(scaled, seeds, positions)


def _lowest_kept(scaled: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """Return the least logit that min-p, top-k and the reach of the noise leave in each row: [num_rows]."""
    lowest = min_p.double().log().clamp(min=-REACH).float()
    largest_k = min(int(top_k.max()), scaled.shape[1])
    if largest_k == 0:
        return lowest
    candidates = scaled.topk(largest_k, dim=-1).values
    kth = candidates.gather(1, (top_k - 1).clamp(0, largest_k - 1).unsqueeze(1)).squeeze(1)
    return torch.where(top_k > 0, torch.maximum(lowest, kth), lowest)


def _filter_top_p(scaled: Tensor, top_p: Tensor) -> Tensor:
    """Keep the most likely tokens, as many as it takes for their probabilities to reach top_p (Holtzman et al., 2019).

    Few tokens usually do; only when some row needs more is the whole vocabulary sorted.
    """
    probabilities = scaled.softmax(dim=-1)
    wanted = (top_p.double() * MASS_ONE).long().clamp(min=1).unsqueeze(1)
    for num_candidates in (min(_FIRST_CANDIDATES, scaled.shape[1]), scaled.shape[1]):
        candidates = probabilities.topk(num_candidates, dim=-1).values
        mass = (candidates.double() * MASS_ONE).long()
        mass_before = mass.cumsum(dim=-1) - mass
        if bool(((mass_before[:, -1:] + mass[:, -1:] >= wanted) | (wanted >= MASS_ONE)).all()):
            break
    least = candidates.masked_fill(mass_before >= wanted, math.inf).amin(dim=-1)
    least = least.masked_fill(top_p >= 1, 0.0)
    return scaled.masked_fill(probabilities < least.unsqueeze(1), -math.inf)


def _largest_with_noise(scaled: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Return argmax(scaled + noise) per row, which draws from softmax(scaled) (Gumbel, 1954). -inf is never drawn.

    Noise is made only for groups of neighbouring ids that hold a token which may be drawn.
    """
    num_rows, vocab_size = scaled.shape
    padded = functional.pad(scaled, (0, -vocab_size % _WORDS), value=-math.inf)
    groups = padded.view(num_rows, -1, _WORDS).double()
    rows, group_ids = (groups > -math.inf).any(dim=-1).nonzero(as_tuple=True)
    noise = _gumbel_noise(seeds[rows], positions[rows], group_ids)  # [num_groups_that_count, 4]
    scores = torch.full_like(groups, -math.inf)
    scores[rows, group_ids] = groups[rows, group_ids] + noise
    return scores.view(num_rows, -1).argmax(dim=-1)


def _gumbel_noise(seeds: Tensor, positions: Tensor, group_ids: Tensor) -> Tensor:
    """Return Gumbel noise of four token ids per entry: float64 [..., 4].

    In float64, because the last bit of a float32 logarithm may depend on where in a tensor its argument stands.
    """
    counter = (group_ids, positions & WORD_MASK, (positions >> 32) & WORD_MASK, torch.zeros_like(group_ids))
    words = philox_4x32(counter, (seeds & WORD_MASK, (seeds >> 32) & WORD_MASK))
    uniform = (words.double() + 0.5) / 2.0**32  # in (0, 1), never at its ends
    return -torch.log(-torch.log1p(-uniform))
