"""Steps of a whole engine: schedule, forward pass, sampling, tokens on the host. Used by the engine's benchmark.

What runs is a colocated worker's leader, its roles, block pool and step loop, without a router and without a network:
messages between the roles are carried from one to the other here. Weights are random, on the device from the start.
"""

import random
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.limits import Limits
from engine.sampler import Sampler
from engine.step_loop import Draw, Forward, StepLoop
from models.facts import ModelFacts
from models.spec import DecoderSpec, ModelSpec
from models.tensor_parallel import Range, TensorParallel
from models.vocabulary import vocabulary_tensors
from protocol.identity import new_attempt, new_request_id
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.messages import Abort, AnyMessage, Failed, Prefill, Reserve, TokenUpdate
from protocol.orders import AnyOrder
from protocol.request import Request, SamplingParams
from worker.assembly import ASSEMBLIES, LeaderParts

EPOCH = 1
BLOCK_SIZE = 16


class RandomTensors:
    """A model's tensors, drawn when they are asked for (models.formats.Tensors). Norms are ones."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = spec.tensors()
        self._shapes |= vocabulary_tensors(spec.vocabulary, self)
        self._dtype = dtype
        self._device = device

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def whole(self, name: str) -> Tensor:
        return self._random(self._shapes[name])

    def rows(self, name: str, rows: Range) -> Tensor:
        return self._random((len(rows), *self._shapes[name][1:]))

    def columns(self, name: str, columns: Range) -> Tensor:
        return self._random((self._shapes[name][0], len(columns)))

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        return torch.randn(shape, dtype=self._dtype, device=self._device) * 0.02


@dataclass(frozen=True)
class Work:
    """batch requests of length prompt tokens each."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


class _Outlet:
    """What the roles say: to one another, and tokens to nobody. As a router does, has both let go of what is over."""

    def __init__(self) -> None:
        self.messages: deque[AnyMessage] = deque()
        self.num_finished = 0

    def send(self, message: AnyMessage) -> None:
        if isinstance(message, Failed):
            raise RuntimeError(f"a request failed: {message.message}")
        self.messages.append(message)

    def emit(self, update: TokenUpdate) -> None:
        if update.finish_reason is not None:
            self.num_finished += 1
            self.messages.append(Abort(update.attempt))


class _OneRank:
    """The ranks of a group of one, whose KV never moves (engine.role.Ranks)."""

    size = 1

    def order(self, order: AnyOrder) -> None:
        raise AssertionError(f"a colocated worker orders nothing: {order}")


class StepSpeed:
    """One leader for all measurements, of whatever runs its batches and draws from what comes of them."""

    def __init__(
        self,
        forward: Forward,
        draw: Draw,
        pool: BlockPool,
        layout: KVLayout,
        limits: Limits,
        vocab_size: int,
        *,
        is_ahead: bool,
    ) -> None:
        self._endpoint = Endpoint(EPOCH, layout, "loopback", ("",))
        self._outlet = _Outlet()
        self._vocab_size = vocab_size
        parts = LeaderParts(pool, _OneRank(), self._outlet, layout, limits.batch_requests)
        self._roles = ASSEMBLIES["colocated"].roles(parts)
        self._steps = StepLoop(self._roles, forward, draw, limits.batch_tokens, BLOCK_SIZE, is_ahead)

    def prefill_s(self, work: Work) -> float:
        """Return the time from all prompts to the last one's first token, the best of two."""
        return min(self._seconds(work, 1) for _ in range(2))

    def decode_step_s(self, work: Work, num_steps: int) -> float:
        """Return the time of one step of the whole batch: of requests with num_steps tokens more than others'."""
        short = self.prefill_s(work)
        return (min(self._seconds(work, num_steps + 1) for _ in range(2)) - short) / num_steps

    def watch_decoding(self, work: Work, num_steps: int, watch: AbstractContextManager[object]) -> None:
        """Run num_steps steps of the whole batch while watch is entered, and all that is before and after outside."""
        self._submit([self._request(work.length, num_steps + work.batch + 2) for _ in range(work.batch)])
        while self._roles[0].num_running < work.batch:
            self._turn()
        with watch:
            for _ in range(num_steps):
                self._turn()
        self._finish()

    def _seconds(self, work: Work, num_tokens: int) -> float:
        requests = [self._request(work.length, num_tokens) for _ in range(work.batch)]
        self._outlet.num_finished = 0
        started = time.perf_counter()
        self._submit(requests)
        while self._outlet.num_finished < work.batch:
            self._turn()
        elapsed = time.perf_counter() - started
        self._finish()
        return elapsed

    def _submit(self, requests: list[Request]) -> None:
        for request in requests:
            attempt = new_attempt(request.request_id, 0, EPOCH, EPOCH)
            self._outlet.messages += [
                Reserve(attempt, request, self._endpoint),
                Prefill(attempt, request, self._endpoint),
            ]

    def _turn(self) -> None:
        self._deliver()
        self._steps.step()

    def _finish(self) -> None:
        while self._outlet.messages or self._steps.step():
            self._deliver()

    def _deliver(self) -> None:
        while self._outlet.messages:
            message = self._outlet.messages.popleft()
            for role in self._roles:
                role.receive(message)

    def _request(self, length: int, num_tokens: int) -> Request:
        prompt = tuple(random.randrange(self._vocab_size) for _ in range(length))
        sampling = SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0, ignore_eos=True)
        return Request(new_request_id(), prompt, sampling)


def engine_speed(
    model: ModelSpec, dtype: torch.dtype, device: torch.device, limits: Limits, num_kv_tokens: int
) -> StepSpeed:
    """Return the leader of an engine with random weights. limits.max_context bounds the longest request."""
    group = TensorParallel(0, 1, None)
    layout = layout_of(model.facts, dtype)
    num_bytes = -(-num_kv_tokens // BLOCK_SIZE) * layout.block_bytes
    source = RandomTensors(model.decoder, dtype, device)
    engine = Engine(model, source, dtype, device, group, layout, num_bytes, limits)
    pool = BlockPool(engine.kv_cache.num_blocks, BLOCK_SIZE, is_caching=False)
    draw, is_ahead = Sampler(engine.vocab_size, device).draw, engine.is_asynchronous
    return StepSpeed(engine.forward, draw, pool, layout, limits, engine.vocab_size, is_ahead=is_ahead)


def layout_of(facts: ModelFacts, dtype: torch.dtype) -> KVLayout:
    """Return the layout of one rank's cache for this model."""
    planes = keys_and_values(facts.num_kv_heads, facts.head_dim, str(dtype).removeprefix("torch."))
    return KVLayout("random", facts.num_layers, planes, BLOCK_SIZE, 1)
