"""From logits to tokens: one draw for every sequence whose step is over, each by its own parameters.

Called by the step loop on rank 0. A row's token depends on its logits, its parameters and its own text only: not on
other rows, the worker or the number of ranks. Order: penalties, logit bias, min_tokens, temperature, min-p, top-k,
top-p. Nothing here waits for the device; only collect() does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.host_copy import HostCopy
from engine.token_counts import Text, TokenCounts
from kernels.backend import operations_for
from kernels.plain.argmax import argmax
from kernels.upload import upload
from protocol.messages import TokenLogprobs
from protocol.request import SamplingParams

_LEAST_TEMPERATURE = 1e-6
"""Below it every draw is the argmax anyway, and a float32 division could overflow."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row is drawn by. position: the draw's number within its request, so output must not move into prompt.

    given: the token that stands there already, where only its log probability is wanted (of a prompt); its row counts
    nothing, whatever the order.
    """

    params: SamplingParams
    text: Text
    position: int
    given: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are asked for at this position; None: no log probabilities."""
        return self.params.num_logprobs if self.given is None else self.params.num_prompt_logprobs


@dataclass(frozen=True, slots=True)
class Drawn:
    """One row's token. is_valid is False when its logits held NaN or infinity; then the token means nothing."""

    token_id: int
    logprobs: TokenLogprobs | None
    is_valid: bool


class Drawing:
    """One step's draws. token_ids: int64 [num_rows] on the device, there for the next step before the host has them."""

    def __init__(self, token_ids: Tensor, are_valid: Tensor, logprobs: "Logprobs | None") -> None:
        self.token_ids = token_ids
        self._copy = HostCopy(token_ids, are_valid)
        self._logprobs = logprobs

    def collect(self) -> list[Drawn]:
        """Wait for the device; return one token for each row."""
        token_ids, are_valid = (tensor.tolist() for tensor in self._copy.wait())
        logprobs = self._logprobs.collect() if self._logprobs else {}
        rows = zip(range(len(token_ids)), token_ids, are_valid, strict=True)
        return [Drawn(token, logprobs.get(row) if is_valid else None, is_valid) for row, token, is_valid in rows]


class Sampler:
    """Draws for one worker. Keeps what penalties need to know of the texts that are being written."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._operations = operations_for(device)
        self._counts = TokenCounts(vocab_size, device)

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Drawing:
        """Draw one token per row of logits, float32 [num_rows, vocab_size], which is left as it was.

        The draws of one text must come in order, each exactly once: penalties count them.
        """
        are_valid = logits.sum(dim=-1).isfinite()  # no sum with a NaN or an infinity is; cheaper than looking at each
        adjusted = self._adjusted(logits, rows)
        token_ids = self._drawn(adjusted, rows)
        self._put_given(token_ids, rows)
        drawing = Drawing(token_ids, are_valid, self._logprobs(logits, rows, token_ids))
        self._count(rows, token_ids)  # last: a draw for which there was no memory is made again, and counts once
        return drawing

    def _adjusted(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Return logits with penalties, biases and min_tokens applied; the same tensor when no row asks for any."""
        penalized, biases = _penalized(rows), _biases(rows, logits.shape[1])
        if not penalized and not biases:
            return logits
        logits = logits.clone()
        if penalized:
            self._penalize(logits, penalized, [rows[index] for index in penalized])
        if biases:
            places, token_ids, values = zip(*biases, strict=True)
            self._add(logits, places, token_ids, values)
        return logits

    def _penalize(self, logits: Tensor, penalized: list[int], rows: list[SamplingRow]) -> None:
        texts = [self._counts.row_of(row.text) for row in rows]
        factors = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in (r.params for r in rows)]
        places = self._integers(penalized, texts)
        [columns] = upload([torch.tensor(factors, dtype=torch.float32).T.contiguous()], self._device)
        self._operations.penalize(logits, *places, self._counts.in_output, self._counts.in_prompt, *columns)

    def _add(self, logits: Tensor, places: Sequence[int], token_ids: Sequence[int], values: Sequence[float]) -> None:
        [amounts] = upload([torch.tensor(values, dtype=torch.float32)], self._device)
        logits.index_put_(tuple(self._integers(places, token_ids)), amounts, accumulate=True)

    def _drawn(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Return int64 [num_rows]; noise is made for the rows that need it only."""
        token_ids = argmax(logits)
        random = [index for index, row in enumerate(rows) if row.given is None and not row.params.is_greedy]
        if not random:
            return token_ids
        [places] = self._integers(random)
        token_ids[places] = self._drawn_at_random(logits[places], [rows[index] for index in random])
        return token_ids

    def _put_given(self, token_ids: Tensor, rows: Sequence[SamplingRow]) -> None:
        given = {index: row.given for index, row in enumerate(rows) if row.given is not None}
        if given:
            places, tokens = self._integers(list(given), list(given.values()))
            token_ids[places] = tokens

    def _drawn_at_random(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        params = [row.params for row in rows]
        reals = [[max(p.temperature, _LEAST_TEMPERATURE), p.top_p, p.min_p] for p in params]
        [columns] = upload([torch.tensor(reals, dtype=torch.float32).T.contiguous()], self._device)
        temperature, top_p, min_p = columns
        top_k, seeds, positions = self._integers(
            [min(p.top_k, logits.shape[1]) for p in params],
            [_as_int64(p.seed) for p in params],
            [row.position for row in rows],
        )
        return self._operations.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)

    def _count(self, rows: Sequence[SamplingRow], token_ids: Tensor) -> None:
        penalized = _penalized(rows)
        if penalized:
            places, texts = self._integers(penalized, [self._counts.row_of(rows[index].text) for index in penalized])
            self._counts.add(texts, token_ids[places])

    def _logprobs(self, logits: Tensor, rows: Sequence[SamplingRow], drawn: Tensor) -> "Logprobs | None":
        asking = {index: row.num_logprobs for index, row in enumerate(rows) if row.num_logprobs is not None}
        if not asking:
            return None
        [places] = self._integers(list(asking))
        return Logprobs(asking, logits[places], drawn[places])

    def _integers(self, *columns: Sequence[int]) -> list[Tensor]:
        """Return each column as int64 on the device."""
        return upload([torch.tensor(column, dtype=torch.int64) for column in columns], self._device)


class Logprobs:
    """Log probabilities under the model's own distribution, for rows that ask for them. asking: how many, by row."""

    def __init__(self, asking: dict[int, int], logits: Tensor, drawn: Tensor) -> None:
        """logits: [num_asking, vocab_size]; drawn: int64 [num_asking]."""
        self._asking = asking
        logprobs = logits.log_softmax(dim=-1)
        of_drawn = logprobs.gather(1, drawn.unsqueeze(1)).squeeze(1)
        self._copy = HostCopy(of_drawn, *logprobs.topk(min(max(asking.values()), logits.shape[1]), dim=-1))

    def collect(self) -> dict[int, TokenLogprobs]:
        """Wait for the device; return them by row."""
        of_drawn, values, token_ids = (tensor.tolist() for tensor in self._copy.wait())
        return {
            row: TokenLogprobs(of_drawn[i], tuple(token_ids[i][:num]), tuple(values[i][:num]))
            for i, (row, num) in enumerate(self._asking.items())
        }


def _penalized(rows: Sequence[SamplingRow]) -> list[int]:
    return [index for index, row in enumerate(rows) if row.given is None and row.params.is_penalized]


def _biases(rows: Sequence[SamplingRow], vocab_size: int) -> list[tuple[int, int, float]]:
    """Return what is added to which logit: row, token id, amount."""
    biases: list[tuple[int, int, float]] = []
    for index, row in enumerate(rows):
        if row.given is not None:
            continue
        biases += [(index, token_id, bias) for token_id, bias in row.params.logit_bias.items()]
        if row.position < row.params.min_tokens:
            known = {token_id for token_id in row.params.ending_token_ids if token_id < vocab_size}
            biases += [(index, token_id, -math.inf) for token_id in known]
    return biases


def _as_int64(seed: int) -> int:
    """Return the low 64 bits of seed as the signed number that has the same bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
