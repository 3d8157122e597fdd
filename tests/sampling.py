"""The sampler for tests that need one draw only: a sampler of its own for every call, and texts that are all known."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.sampler import Drawn, Sampler, SamplingRow
from protocol.request import SamplingParams


@dataclass(eq=False)
class WrittenText:
    """See engine.token_counts.Text."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


def row_of(params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> SamplingRow:
    return SamplingRow(params, WrittenText(prompt, output), len(output))


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
    return Sampler(logits.shape[1], logits.device).draw(logits, rows).collect()
