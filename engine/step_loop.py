"""One step of a worker: each role schedules its part, the batch runs once, each role commits its results.

Called over and over by the worker. Earlier roles have first call on the token budget (a colocated worker puts decode
first, so that running streams do not wait for prompts).
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from engine.batching import build_batch, lay_out
from engine.role import Role
from engine.sampler import Drawn, SamplingRow, sample
from engine.sequence import Chunk
from protocol.orders import Batch

Forward = Callable[[Batch], torch.Tensor]
"""Runs a batch on all ranks; returns logits [num_sampled, vocab_size]."""


class StepLoop:
    """Turns what roles schedule into batches, and logits into tokens."""

    def __init__(self, roles: SequenceOf[Role], forward: Forward, batch_tokens: int, block_size: int) -> None:
        self._roles = roles
        self._forward = forward
        self._batch_tokens = batch_tokens
        self._block_size = block_size
        self.num_steps = 0

    def step(self) -> bool:
        """Run one forward pass. Return whether there was anything to do."""
        role_of = self._schedule()
        if not role_of:
            return False
        chunks = lay_out(list(role_of))
        logits = self._forward(build_batch(chunks, self._block_size))
        drawn = iter(sample(logits, [_sampling_row(chunk) for chunk in chunks if chunk.is_sampled]))
        for chunk in chunks:
            self._commit(role_of[chunk], chunk, next(drawn) if chunk.is_sampled else None)
        self.num_steps += 1
        return True

    def _schedule(self) -> dict[Chunk, Role]:
        budget, role_of = self._batch_tokens, {}
        for role in self._roles:
            for chunk in role.schedule(budget):
                role_of[chunk] = role
                budget -= chunk.num_tokens
        return role_of

    @staticmethod
    def _commit(role: Role, chunk: Chunk, drawn: Drawn | None) -> None:
        chunk.sequence.num_computed = chunk.end
        role.commit(chunk, drawn)


def _sampling_row(chunk: Chunk) -> SamplingRow:
    sequence = chunk.sequence
    return SamplingRow(sequence.request.sampling, sequence.request.prompt_token_ids, sequence.output_token_ids)
