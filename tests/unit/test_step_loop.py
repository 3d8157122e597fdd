"""One step after another, with and without one under way: every token once, in order, and memory that runs out."""

from collections.abc import Sequence as SequenceOf

import pytest
import torch

from engine.block_pool import BlockPool
from engine.prefix_hash import HashChain
from engine.sampler import Drawn, SamplingRow
from engine.sequence import Chunk, Sequence
from engine.step_loop import StepLoop
from protocol.errors import FailureCode
from protocol.identity import Attempt
from protocol.orders import Batch
from protocol.request import Request, SamplingParams

MAX_TOKENS = 6
BLOCK_SIZE = 4


class Everything:
    """A role that runs all its sequences to the end, as colocated roles do together."""

    def __init__(self, prompts: list[list[int]], end: int) -> None:
        self.failed: list[int] = []
        pool = BlockPool(400, BLOCK_SIZE)
        self.sequences = [sequence_of(pool, index, prompt, end) for index, prompt in enumerate(prompts)]
        self.running = list(self.sequences)

    def schedule(self, num_tokens: int) -> list[Chunk]:
        chunks = []
        for sequence in self.running:
            if num_tokens and not sequence.is_drawn:
                chunks.append(sequence.next_chunk(num_tokens))
                num_tokens -= chunks[-1].num_tokens
        return chunks

    def commit(self, chunk: Chunk, drawn: list[Drawn]) -> None:
        if not drawn or chunk.sequence not in self.running:
            return
        chunk.sequence.token_ids.append(drawn[-1].token_id)
        if chunk.sequence.finish_reason:
            self.running.remove(chunk.sequence)

    def fail(self, chunk: Chunk, code: FailureCode, message: str) -> None:
        assert code == "out_of_memory"
        self.failed.append(self.sequences.index(chunk.sequence))
        self.running.remove(chunk.sequence)


class SumModel:
    """The next token is the sum of all before it; what it has seen is remembered by slot, as KV would be."""

    def __init__(self, block_size: int, max_tokens: int = 1000) -> None:
        self.block_size = block_size
        self.max_tokens = max_tokens
        self.kv: dict[int, int] = {}
        self.num_carried = 0

    def forward(self, batch: Batch, drawn: list[int] | None) -> list[int]:
        if len(batch.token_ids) > self.max_tokens:
            raise torch.OutOfMemoryError("too many tokens")
        token_ids = list(batch.token_ids)
        for carried in batch.carried:
            assert drawn is not None
            assert token_ids[carried.index] == 0
            token_ids[carried.index] = drawn[carried.row]
        self.num_carried += len(batch.carried)
        tokens, sums = iter(token_ids), []
        for length, end, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
            blocks = memoryview(table).cast("i")
            slots = [
                blocks[position // self.block_size] * self.block_size + position % self.block_size
                for position in range(end)
            ]
            for slot in slots[end - length :]:
                self.kv[slot] = next(tokens)
            sums += [sum(self.kv[slot] for slot in slots[: at + 1]) % 97 for at in range(end - length, end)]
        return [sums[index] for index in batch.sampled]


class Draws:
    """One step's tokens. positions: the draws' numbers, as the sampler would use them."""

    def __init__(self, token_ids: list[int], rows: SequenceOf[SamplingRow]) -> None:
        self.token_ids = token_ids
        for row in rows:
            assert isinstance(row.text, Sequence)
            assert row.position == row.text.num_tokens - row.text.num_prompt_tokens

    def collect(self) -> list[Drawn]:
        return [Drawn(token, None, True) for token in self.token_ids]


def sequence_of(pool: BlockPool, index: int, prompt: list[int], end: int) -> Sequence:
    sampling = SamplingParams(MAX_TOKENS, seed=0, temperature=0.0, stop_token_ids=(end,))
    request = Request(str(index), tuple(prompt), sampling)
    hold = pool.acquire([], pool.blocks_for(request.max_num_tokens))
    assert hold is not None
    return Sequence(Attempt(str(index), 0, 1, 2, index), request, hold, HashChain(b"", BLOCK_SIZE), 0)


def expected(prompt: list[int], end: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + MAX_TOKENS:
        tokens.append(sum(tokens) % 97)
        if tokens[-1] == end:
            break
    return tokens[len(prompt) :]


PROMPTS = [[index + 1, *range(index * 2)] for index in range(9)]


@pytest.mark.parametrize("end", [-1, 8, 36])
@pytest.mark.parametrize("batch_tokens", [1, 5, 64])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_every_token_comes_once_and_in_order(is_ahead: bool, batch_tokens: int, end: int) -> None:
    role, model = Everything(PROMPTS, end), SumModel(BLOCK_SIZE)
    loop = StepLoop([role], model.forward, Draws, batch_tokens, BLOCK_SIZE, is_ahead)  # type: ignore[list-item]
    while loop.step():
        pass
    assert [s.output_token_ids for s in role.sequences] == [expected(prompt, end) for prompt in PROMPTS]
    assert bool(model.num_carried) == is_ahead
    assert all(sequence.num_drawing == 0 for sequence in role.sequences)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_when_memory_runs_out_the_newest_request_ends_and_the_others_go_on(is_ahead: bool) -> None:
    role, model = Everything(PROMPTS, -1), SumModel(BLOCK_SIZE, max_tokens=30)
    loop = StepLoop([role], model.forward, Draws, 64, BLOCK_SIZE, is_ahead)  # type: ignore[list-item]
    while loop.step():
        pass
    assert role.failed == [7, 8, 6, 5]
    survivors = [index for index in range(9) if index not in role.failed]
    for index in survivors:
        assert role.sequences[index].output_token_ids == expected(PROMPTS[index], -1)


def test_a_cpu_that_has_no_memory_to_draw_so_many_tokens_draws_those_of_fewer_requests() -> None:
    def draw(logits: list[int], rows: SequenceOf[SamplingRow]) -> Draws:
        if len(rows) > 6:
            raise MemoryError
        return Draws(logits, rows)

    role, model = Everything(PROMPTS, -1), SumModel(BLOCK_SIZE)
    loop = StepLoop([role], model.forward, draw, 100, BLOCK_SIZE)  # type: ignore[list-item]
    while loop.step():
        pass
    assert role.failed == [8, 7, 6]
    assert all(role.sequences[index].output_token_ids == expected(PROMPTS[index], -1) for index in range(6))
