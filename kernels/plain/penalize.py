"""Repetition, frequency and presence penalties on the tokens that a text holds already. Called by the sampler.

Reads how often a text holds each token from tables that the sampler keeps on the device.
"""

import torch
from torch import Tensor


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
    """Penalize some rows of logits [num_rows, vocab_size] in place.

    rows: int64 [num_penalized], distinct; texts: int64 [num_penalized], whose counts each of them is penalized by
    in_output: int32 [num_texts, vocab_size], how often; in_prompt: bool [num_texts, vocab_size], whether at all
    repetition, frequency, presence: float32 [num_penalized]; repetition (Keskar et al., "CTRL", 2019) divides positive
    logits and multiplies negative ones, the other two are subtracted, per occurrence in the output and once
    """
    old, counts = logits[rows], in_output[texts]  # [num_penalized, vocab_size]
    factor = torch.where(in_prompt[texts] | (counts > 0), repetition.unsqueeze(1), 1.0)
    new = torch.where(old > 0, old / factor, old * factor)
    logits[rows] = new - frequency.unsqueeze(1) * counts - presence.unsqueeze(1) * (counts > 0)
