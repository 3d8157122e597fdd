"""An engine that serves written-down texts, step by step, with the production loop and sampler and one simple role.

For tests that compare what a device answers with what another one does.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.limits import KVMemory, Limits
from engine.prefix_hash import HashChain
from engine.sampler import Drawn, Sampler
from engine.sequence import Chunk, Sequence
from engine.step_loop import StepLoop
from models.loading import load_model
from models.tensor_parallel import TensorParallel
from protocol.errors import FailureCode
from protocol.identity import Attempt
from protocol.request import Request, SamplingParams
from tests.models import layout_of

BLOCK_SIZE = 16
LIMITS = Limits(batch_tokens=24, batch_requests=5, max_context=96)


@dataclass(frozen=True)
class Text:
    """leaves: after how many tokens its reader goes away."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    leaves: int | None = None


@dataclass
class Texts:
    """A role: as many texts at a time as blocks allow, in the order in which they came."""

    texts: list[Text]
    pool: BlockPool
    drawn: dict[int, list[Drawn]] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    running: dict[Sequence, int] = field(default_factory=dict)
    num_admitted: int = 0

    @property
    def is_done(self) -> bool:
        return self.num_admitted == len(self.texts) and not self.running

    def schedule(self, num_tokens: int) -> list[Chunk]:
        self._admit()
        chunks: list[Chunk] = []
        for sequence in self.running:
            if num_tokens and not sequence.is_drawn:
                chunks.append(sequence.next_chunk(num_tokens))
                num_tokens -= chunks[-1].num_tokens
        return chunks

    def _admit(self) -> None:
        """Take the next text, one in every step."""
        index = self.num_admitted
        if index == len(self.texts) or len(self.running) == LIMITS.batch_requests:
            return
        text = self.texts[index]
        request = Request(str(index), text.prompt, text.sampling)
        hold = self.pool.acquire((), self.pool.blocks_for(request.max_num_tokens))
        if hold is not None:
            sequence = Sequence(Attempt(str(index), 0, 1, 2, index), request, hold, HashChain(b"", BLOCK_SIZE), 0)
            self.running[sequence], self.drawn[index] = index, []
            self.num_admitted += 1

    def commit(self, chunk: Chunk, drawn: list[Drawn]) -> None:
        sequence = chunk.sequence
        if not drawn or sequence not in self.running:
            return
        index = self.running[sequence]
        sequence.token_ids.append(drawn[-1].token_id)
        self.drawn[index].append(drawn[-1])
        if sequence.finish_reason or len(self.drawn[index]) == self.texts[index].leaves:
            self._end(sequence)

    def fail(self, chunk: Chunk, code: FailureCode, message: str) -> None:
        assert code == "out_of_memory"
        self.failed.append(self.running[chunk.sequence])
        self._end(chunk.sequence)

    def _end(self, sequence: Sequence) -> None:
        del self.running[sequence]
        sequence.hold.release()


def new_engine(model: Path, device: str, kv_memory: KVMemory = 300 << 10) -> Engine:
    """Return an engine with few blocks, which every text that comes takes from one that has just gone."""
    spec = load_model(model)
    layout = layout_of(spec.facts, BLOCK_SIZE)
    return Engine(spec, model, torch.float32, torch.device(device), TensorParallel(0, 1), layout, kv_memory, LIMITS)


def new_loop(engine: Engine, texts: list[Text]) -> tuple[StepLoop, Texts]:
    """Return what serves texts, a step ahead where the device computes by itself."""
    role = Texts(texts, BlockPool(engine.kv_cache.num_blocks, BLOCK_SIZE))
    draw = Sampler(engine.vocab_size, engine.device).draw
    loop = StepLoop([role], engine.forward, draw, LIMITS.batch_tokens, BLOCK_SIZE, engine.is_asynchronous)  # type: ignore[list-item]
    return loop, role


def serve(engine: Engine, texts: list[Text]) -> dict[int, list[Drawn]]:
    """Return what was drawn for every text."""
    loop, role = new_loop(engine, texts)
    while not role.is_done:
        loop.step()
    while loop.step():
        """What was under way is over."""
    return role.drawn
