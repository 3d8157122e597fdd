"""One step of a worker: each role schedules its part, the batch runs once, each role commits its results.

Called over and over by the worker. Earlier roles have first call on the token budget (a colocated worker puts decode
first, so that running streams do not wait for prompts). Where the device computes by itself, a step is launched before
the last one's tokens are read (overlap or asynchronous scheduling): whatever ends a sequence takes effect one step
later, and what that step computed for it is dropped.

The blocks of a sequence that ends are free although a step under way still writes to them. That is safe: steps run one
after another, so a later step's writes come later, and KV from elsewhere needs a grant, which the ranks' reports bring
in a later turn of the loop, when that step has landed.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, Protocol

import torch

from engine.batching import build_batch, lay_out
from engine.out_of_memory import naming_lack_of_memory
from engine.role import Role
from engine.sampler import Drawn, SamplingRow
from engine.sequence import Chunk, Sequence
from protocol.orders import Batch

Forward = Callable[[Batch, Any], Any]
"""Runs a batch on all ranks, given the token ids that the step before draws; returns [num_sampled, vocab_size]."""


class PendingTokens(Protocol):
    """The tokens of one step, perhaps not known yet."""

    @property
    def token_ids(self) -> Any:
        """As forward takes them."""

    def collect(self) -> list[Drawn]:
        """Wait for the tokens, one for each row."""


Draw = Callable[[Any, SequenceOf[SamplingRow]], PendingTokens]
"""Draws a token from every row of what forward returned."""


@dataclass(frozen=True)
class _Launched:
    """A step under way."""

    chunks: list[Chunk]
    role_of: dict[Chunk, Role]
    drawing: PendingTokens

    @property
    def rows(self) -> dict[Sequence, int]:
        """Which row draws the next token of a sequence: the last of its chunk's."""
        ends = accumulate(len(chunk.wanted) for chunk in self.chunks)
        return {chunk.sequence: end - 1 for chunk, end in zip(self.chunks, ends, strict=True) if chunk.is_drawn}


class StepLoop:
    """Turns what roles schedule into batches, and logits into tokens. is_ahead: launch before reading."""

    def __init__(
        self,
        roles: SequenceOf[Role],
        forward: Forward,
        draw: Draw,
        batch_tokens: int,
        block_size: int,
        is_ahead: bool = False,
    ) -> None:
        self._roles = roles
        self._forward = forward
        self._draw = draw
        self._batch_tokens = batch_tokens
        self._block_size = block_size
        self._is_ahead = is_ahead
        self._under_way: _Launched | None = None
        self.num_steps = 0

    def step(self) -> bool:
        """Launch a forward pass and commit one. Return whether there was anything to do."""
        before, launched = self._under_way, self._launch()
        if before is not None:
            self._land(before)
        if launched is not None and not self._is_ahead:
            self._land(launched)
        self._under_way = launched if self._is_ahead else None
        return before is not None or launched is not None

    def _launch(self) -> _Launched | None:
        while role_of := self._schedule():
            try:
                launched = self._run(role_of)
            except torch.OutOfMemoryError as error:
                self._shed(role_of, error)
                continue
            for chunk in launched.chunks:
                chunk.sequence.launch(chunk)
            self.num_steps += 1
            return launched
        return None

    def _schedule(self) -> dict[Chunk, Role]:
        """Return the chunks of the next batch and whose they are; what came last is last."""
        budget, role_of = self._batch_tokens, {}
        for role in self._roles:
            for chunk in role.schedule(budget):
                role_of[chunk] = role
                budget -= chunk.num_tokens
        return role_of

    def _run(self, role_of: dict[Chunk, Role]) -> _Launched:
        before, chunks = self._under_way, lay_out(list(role_of))
        batch = build_batch(chunks, self._block_size, before.rows if before else {})
        logits = self._forward(batch, before.drawing.token_ids if before else None)
        with naming_lack_of_memory():
            drawing = self._draw(logits, [row for chunk in chunks for row in _sampling_rows(chunk)])
        return _Launched(chunks, role_of, drawing)

    @staticmethod
    def _shed(role_of: dict[Chunk, Role], error: torch.OutOfMemoryError) -> None:
        """End the request that came last, so that the others can go on."""
        chunk, role = list(role_of.items())[-1]
        role.fail(chunk, "out_of_memory", f"no memory for this request's part of a step: {error}")

    def _land(self, launched: _Launched) -> None:
        drawn = iter(launched.drawing.collect())
        for chunk in launched.chunks:
            chunk.sequence.land(chunk)
            launched.role_of[chunk].commit(chunk, list(islice(drawn, len(chunk.wanted))))


def _sampling_rows(chunk: Chunk) -> Iterator[SamplingRow]:
    """Yield a row for every wanted position: behind the last a token is drawn, if it is the sequence's last."""
    sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
    for position in chunk.wanted:
        is_drawn = chunk.is_drawn and position == chunk.end - 1
        given = None if is_drawn else sequence.token_ids[position + 1]
        yield SamplingRow(sampling, sequence, position + 1 - sequence.num_prompt_tokens, given)
