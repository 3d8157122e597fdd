"""From logits to tokens: one draw for every sequence whose step is over, each by its own parameters.

Called by the worker on rank 0. A row's token depends on its logits, its parameters and its own text only: not on other
rows, the worker or the number of ranks. Order: penalties, logit bias, min_tokens, temperature, min-p, top-k, top-p.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import operations_for
from protocol.messages import TokenLogprobs
from protocol.request import SamplingParams

_LEAST_TEMPERATURE = 1e-6
"""Below it every draw is the argmax anyway, and a float32 division could overflow."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row is drawn by. The draw's number is len(output_token_ids), so output must not move into the prompt."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One row's token. is_valid is False when its logits held NaN or infinity; then the token means nothing."""

    token_id: int
    logprobs: TokenLogprobs | None
    is_valid: bool


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
    """Draw one token per row of logits, float32 [num_rows, vocab_size], which is left as it was."""
    if not rows:
        return []
    low, high = torch.aminmax(logits, dim=-1)  # both are NaN in a row that holds one
    are_valid = (low.isfinite() & high.isfinite()).tolist()
    drawn = _draw(_adjusted(logits, rows), rows)
    logprobs = _logprobs(logits, rows, drawn)
    token_ids = drawn.tolist()
    return [Drawn(token_ids[i], logprobs.get(i) if are_valid[i] else None, are_valid[i]) for i in range(len(token_ids))]


def _adjusted(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return logits with penalties, biases and min_tokens applied; the same tensor when no row asks for any."""
    changes = _Changes(logits.shape[1])
    for index, row in enumerate(rows):
        changes.add(index, row)
    return changes.apply(logits, [row.params for row in rows])


class _Changes:
    """The (row, token) pairs whose logits change, collected row by row."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._penalties: list[tuple[int, int, int]] = []  # row, token id, count in the output
        self._biases: list[tuple[int, int, float]] = []  # row, token id, what to add

    def add(self, index: int, row: SamplingRow) -> None:
        params = row.params
        if params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0:
            counts = Counter(row.output_token_ids)
            if params.repetition_penalty != 1:
                counts.update(dict.fromkeys(row.prompt_token_ids, 0))
            self._penalties += [(index, token_id, count) for token_id, count in counts.items()]
        self._biases += [(index, token_id, bias) for token_id, bias in params.logit_bias.items()]
        if len(row.output_token_ids) < params.min_tokens:
            known = {token_id for token_id in params.ending_token_ids if token_id < self._vocab_size}
            self._biases += [(index, token_id, -math.inf) for token_id in known]

    def apply(self, logits: Tensor, params: list[SamplingParams]) -> Tensor:
        if not self._penalties and not self._biases:
            return logits
        logits = logits.clone()
        if self._penalties:
            self._penalize(logits, params)
        if self._biases:
            rows, token_ids, biases = zip(*self._biases, strict=True)
            places = (torch.tensor(rows, device=logits.device), torch.tensor(token_ids, device=logits.device))
            logits.index_put_(places, torch.tensor(biases, device=logits.device), accumulate=True)
        return logits

    def _penalize(self, logits: Tensor, params: list[SamplingParams]) -> None:
        pairs = torch.tensor(self._penalties, device=logits.device)
        factors = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
        repetition, frequency, presence = torch.tensor(factors, device=logits.device).unbind(dim=1)
        operations_for(logits.device).penalize(
            logits, pairs[:, 0], pairs[:, 1], pairs[:, 2], repetition, frequency, presence
        )


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return int64 [num_rows]; noise is made for the rows that need it only."""
    token_ids = logits.argmax(dim=-1)
    random = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if random:
        places = torch.tensor(random, device=logits.device)
        token_ids[places] = _draw_at_random(logits[places], [rows[index] for index in random])
    return token_ids


def _draw_at_random(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    params = [row.params for row in rows]
    reals = [[max(p.temperature, _LEAST_TEMPERATURE), p.top_p, p.min_p] for p in params]
    vocab_size = logits.shape[1]
    integers = [
        [min(p.top_k, vocab_size), _as_int64(p.seed), len(row.output_token_ids)]
        for p, row in zip(params, rows, strict=True)
    ]
    temperature, top_p, min_p = torch.tensor(reals, device=logits.device).unbind(dim=1)
    top_k, seeds, positions = torch.tensor(integers, device=logits.device).unbind(dim=1)
    return operations_for(logits.device).sample(logits, temperature, top_k, top_p, min_p, seeds, positions)


def _as_int64(seed: int) -> int:
    """Return the low 64 bits of seed as the signed number that has the same bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], drawn: Tensor) -> dict[int, TokenLogprobs]:
    """Return, by row, log probabilities under the model's own distribution, where a row asks for them."""
    asking = {index: row.params.num_logprobs for index, row in enumerate(rows) if row.params.num_logprobs is not None}
    if not asking:
        return {}
    places = torch.tensor(list(asking), device=logits.device)
    logprobs = logits[places].log_softmax(dim=-1)
    of_drawn = logprobs.gather(1, drawn[places].unsqueeze(1)).squeeze(1).tolist()
    top = logprobs.topk(min(max(asking.values()), logits.shape[1]), dim=-1)
    values, token_ids = top.values.tolist(), top.indices.tolist()
    return {
        index: TokenLogprobs(of_drawn[i], tuple(token_ids[i][:num]), tuple(values[i][:num]))
        for i, (index, num) in enumerate(asking.items())
    }
