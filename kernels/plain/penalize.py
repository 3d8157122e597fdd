"""Repetition, frequency and presence penalties on the tokens that a text holds already. Called by the sampler.

Works on the few (row, token) pairs concerned, not on whole rows.
"""

import torch
from torch import Tensor


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalize logits [num_rows, vocab_size] in place.

    rows, token_ids: int64 [num_pairs], distinct pairs of a row and a token that its prompt or output holds
    output_counts: int64 [num_pairs], how often the output holds it (0: only the prompt does)
    repetition, frequency, presence: float32 [num_rows]; repetition (Keskar et al., "CTRL", 2019) divides positive
    logits and multiplies negative ones, the other two are subtracted, per occurrence in the output and once
    """
    old = logits[rows, token_ids]  # [num_pairs]
    factor = repetition[rows]
    new = torch.where(old > 0, old / factor, old * factor)
    new = new - frequency[rows] * output_counts - presence[rows] * (output_counts > 0)
    logits[rows, token_ids] = new
