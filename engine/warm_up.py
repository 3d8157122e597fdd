"""Runs everything once that requests will launch, so that none of them waits for a compilation. Called by the engine.

Kernels are compiled per kind of work, not per size (kernels/triton/configurations.py), so one batch of each kind is
enough; sizes are the largest there are, so that memory is taken for the worst. All tokens lie in the scratch block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.limits import Limits
from engine.sampler import Sampler, SamplingRow
from protocol.orders import Batch, block_table
from protocol.request import SamplingParams

_KINDS_OF_SAMPLING = (
    SamplingParams(1, seed=0, temperature=0.0),
    SamplingParams(1, seed=1, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(1, seed=2, repetition_penalty=1.1, logit_bias={0: 1.0}, num_logprobs=1),
)


@dataclass(eq=False)
class _Nothing:
    """A text without a token."""

    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()


def warm_up(forward: Callable[[Batch], Tensor | None], limits: Limits, block_size: int, scratch_block: int) -> None:
    """Run the largest batches of each kind through forward, and sample from what comes of the widest."""
    logits = None
    for batch in _batches(limits, block_size, scratch_block):
        logits = forward(batch)
    if logits is not None:
        _sample(logits)


def _batches(limits: Limits, block_size: int, scratch_block: int) -> Iterator[Batch]:
    """Yield one long prompt, a continued prompt beside single tokens, and single tokens only."""
    long = min(limits.batch_tokens, limits.max_context)
    yield prompt_batch(limits.batch_tokens, limits.max_context, block_size, scratch_block)
    num_singles = min(limits.batch_requests, limits.batch_tokens)
    part = max(2, min(limits.batch_tokens - num_singles, long // 2))
    yield _batch([*[1] * num_singles, part], [*[1] * num_singles, min(2 * part, long)], block_size, scratch_block)
    yield _batch([1] * num_singles, [limits.max_context] * num_singles, block_size, scratch_block)


def prompt_batch(num_tokens: int, max_context: int, block_size: int, scratch_block: int) -> Batch:
    """Return a batch of prompts as long as a context allows, num_tokens in all, in the scratch block."""
    num_whole, rest = divmod(num_tokens, max_context)
    lens = [max_context] * num_whole + [rest] * (rest > 0)
    return _batch(lens, lens, block_size, scratch_block)


def _batch(query_lens: list[int], context_lens: list[int], block_size: int, scratch_block: int) -> Batch:
    query_lens = [min(query, context) for query, context in zip(query_lens, context_lens, strict=True)]
    return Batch(
        token_ids=(0,) * sum(query_lens),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        block_tables=tuple(block_table([scratch_block] * -(-context // block_size)) for context in context_lens),
        sampled=tuple(end - 1 for end in accumulate(query_lens)),
    )


def _sample(logits: Tensor) -> None:
    sampler = Sampler(logits.shape[1], logits.device)
    text = _Nothing()
    for kind in _KINDS_OF_SAMPLING:
        rows = [SamplingRow(kind, text if index == 0 else _Nothing(), 0) for index in range(len(logits))]
        sampler.draw(torch.zeros_like(logits), rows).collect()
