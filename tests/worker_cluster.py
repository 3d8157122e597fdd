"""Real workers and the router's real control plane in one process: no Ray, no HTTP, everything between them real.

Each rank is a thread that lives run_worker's whole life: joining, assembling its group over gloo, loading, serving. The
router's event loop is one more thread. Tests submit requests and look at pools.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from models.loading import load_facts
from protocol.codec import decode
from protocol.identity import new_request_id
from protocol.messages import AnyMessage, PromptLogprobs, RoleName, TokenUpdate
from protocol.request import Request, SamplingParams
from protocol.stages import Stage
from protocol.topology import (
    AnyRoleSection,
    ColocatedSection,
    DecodeSection,
    Device,
    KVTransferSection,
    PrefillSection,
    RouterSection,
    Transport,
)
from router.control.controller import Controller, Effect, Transmit
from router.control.events import Outcome
from router.control.membership import Group, Member
from router.control.plane import ControlPlane
from router.launch import GroupSpec, RouterLaunch
from tests.members import SECRET
from worker.launch import CacheLaunch, ModelLaunch, WorkerLaunch
from worker.life import run_worker

HOST = "127.0.0.1"
GONE = Outcome(Stage.CANCELLED, "client_gone")
DEADLINE_S = 60.0


@dataclass
class Answer:
    """What a client got."""

    prompt: list[PromptLogprobs] = field(default_factory=list)
    updates: list[TokenUpdate] = field(default_factory=list)
    outcome: Outcome | None = None

    @property
    def token_ids(self) -> list[int]:
        return [update.token_id for update in self.updates]

    @property
    def said(self) -> list[object]:
        """All that a client can see of it but for logprobs: tokens, their places and alternatives, how it ended."""
        updates = [
            (u.index, u.token_id, u.logprobs and u.logprobs.top_token_ids, u.finish_reason) for u in self.updates
        ]
        return [*updates, self.outcome and self.outcome.code]

    @property
    def logprobs(self) -> list[float]:
        """Log probabilities of the tokens and of their alternatives, one after another."""
        asked = [update.logprobs for update in self.updates if update.logprobs]
        return [value for logprobs in asked for value in (logprobs.logprob, *logprobs.top_logprobs)]

    @property
    def cuts(self) -> set[int]:
        """The places of the tokens that were each the first of another attempt."""
        return {later.index for earlier, later in pairwise(self.updates) if earlier.attempt != later.attempt}


@dataclass(frozen=True)
class Leave:
    """When a client goes away: after so many tokens, so many seconds, or when a message of this kind is about it."""

    after_tokens: int | None = None
    after_s: float | None = None
    at_message: type[AnyMessage] | None = None


class WatchedController(Controller):
    """The router's mind, with somebody who is shown every message from one worker to another before it leaves."""

    def __init__(self, launch: RouterLaunch, watch: Callable[[AnyMessage], None]) -> None:
        super().__init__(launch)
        self._watch = watch

    def receive(self, identity: bytes, data: bytes) -> list[Effect]:
        effects = super().receive(identity, data)
        for effect in effects:
            if isinstance(effect, Transmit):
                self._watch(decode(effect.data).message)
        return effects


class WorkerCluster:
    """Groups of the roles named, (role, number of groups, tensor_parallel), over one transport. A context manager.

    block_sizes: those of decode groups last, of all others first. decode_memory_bytes: where decode's differs.
    timeout_s: of every single KV operation.
    """

    def __init__(
        self,
        model: Path,
        roles: list[tuple[RoleName, int, int]],
        transport: Transport = "zmq",
        memory_bytes: int = 8 << 20,
        block_sizes: tuple[int, int] = (16, 16),
        batch_tokens: int = 256,
        decode_memory_bytes: int | None = None,
        growth_tokens: int | None = None,
        timeout_s: float = 10,
        min_fetch_tokens: int = 0,
        device: Device = "cpu",
        batch_requests: int = 256,
    ) -> None:
        self._model = model
        self._device = device
        self._memory_bytes = memory_bytes
        self._block_sizes = block_sizes
        self._batch_tokens = batch_tokens
        self._batch_requests = batch_requests
        self._decode_memory_bytes = decode_memory_bytes or memory_bytes
        self._growth_tokens = growth_tokens
        self._kv_transfer = KVTransferSection(
            transport=transport, timeout_s=timeout_s, min_fetch_tokens=min_fetch_tokens
        )
        self._groups = tuple(GroupSpec(role, group, tp) for role, num, tp in roles for group in range(num))
        self._loop = asyncio.new_event_loop()
        self._threads: list[threading.Thread] = []
        self._leaving_at: dict[str, type[AnyMessage] | None] = {}
        self._see: Callable[[AnyMessage], None] = lambda message: None
        self.on_token: Callable[[TokenUpdate], None] = lambda update: None
        """Called on the router's thread with every token, when its client has it."""
        self.errors: list[BaseException] = []

    def __enter__(self) -> "WorkerCluster":
        self._start(self._loop.run_forever)
        self._on_loop(self._open_router())
        for spec in self._groups:
            for rank in range(spec.tensor_parallel):
                self._start_rank(self._launch(spec, rank))
        self.wait_until_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything. Whatever a test was about, its pools must be whole at the end."""
        if error is None:
            self.assert_pools_whole()
        self._on_loop(self._control.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in self._threads), "a worker did not stop"
        self._loop.close()
        if error is None:
            assert not self.errors, self.errors

    def let_all_fail(self) -> None:
        """After a start that has failed: every rank ends while the router is there to tell it of the others."""
        for thread in self._threads[1:]:
            thread.join(timeout=20)
        failed = RuntimeError("the start has failed")
        self.__exit__(type(failed), failed, None)

    def leave_together(self) -> None:
        """Let every client go away in one moment."""

        async def leave() -> None:
            self._control.cancel_all(GONE)

        self._on_loop(leave())

    def submit(
        self, prompt: list[int], sampling: SamplingParams, salt: str = "", leave: "Leave | None" = None
    ) -> "Future[Answer]":
        """Start a request; the future holds its answer when it is over. leave: when its client goes away."""
        request = Request(new_request_id(), tuple(prompt), sampling, salt)
        future: Future[Answer] = Future()
        answer = Answer()

        def client(event: TokenUpdate | PromptLogprobs | Outcome) -> None:
            if isinstance(event, PromptLogprobs):
                answer.prompt.append(event)
                return
            if isinstance(event, TokenUpdate):
                answer.updates.append(event)
                self.on_token(event)
                if leave and leave.after_tokens == len(answer.updates):
                    self._loop.call_soon(self._control.cancel, request.request_id, GONE)
                return
            answer.outcome = event
            future.set_result(answer)

        async def submit() -> None:
            self._leaving_at[request.request_id] = leave.at_message if leave else None
            self._control.submit(request, time.monotonic() + DEADLINE_S, client)
            if leave and leave.after_s is not None:
                self._loop.call_later(leave.after_s, self._control.cancel, request.request_id, GONE)

        self._on_loop(submit())
        return future

    def generate(self, prompts: list[list[int]], sampling: SamplingParams) -> list[list[int]]:
        """Return the answers to prompts that all run at once; a failed one is an error here."""
        answers = [future.result(DEADLINE_S) for future in [self.submit(prompt, sampling) for prompt in prompts]]
        assert all(answer.outcome and answer.outcome.code in ("stop", "length") for answer in answers), answers
        return [answer.token_ids for answer in answers]

    def watch(self, see: Callable[[AnyMessage], None]) -> None:
        """Show see every message from one worker to another, on the router's thread, before it leaves."""
        self._see = see

    def wait_until_ready(self) -> None:
        """Return when every rank of every group serves. On a GPU they compile first."""
        timeout_s = 60 if self._device == "cpu" else 240
        self.wait_until(
            lambda: self.controller.dispatcher.why_none is None and self._num_ready() == self._num_ranks, timeout_s
        )

    def groups(self) -> list[Group]:
        """Return what the router knows of every group."""
        return list(self.controller.membership.groups.values())

    def leaders(self) -> list[Member]:
        """Return what the router knows of every group's leader."""
        return [group.ranks[0] for group in self.groups()]

    def assert_pools_whole(self) -> None:
        """Wait for the next heartbeats, then hold that nothing is held and nothing lost anywhere."""
        self.wait_until(lambda: all(self._is_idle(rank) for rank in self.leaders()), timeout_s=5)
        for rank in self.leaders():
            blocks = rank.load.blocks
            assert blocks.free + blocks.cached == blocks.total > 0
            assert blocks.held == 0

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Poll condition; an error of a worker ends the wait."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert not self.errors, self.errors
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    def _watch(self, message: AnyMessage) -> None:
        attempt = getattr(message, "attempt", None)
        if attempt and self._leaving_at.get(attempt.request_id) is type(message):
            self._loop.call_soon(self._control.cancel, attempt.request_id, GONE)
        self._see(message)

    @property
    def _num_ranks(self) -> int:
        return sum(spec.tensor_parallel for spec in self._groups)

    def _num_ready(self) -> int:
        groups = self.controller.membership.groups.values()
        return sum(rank.state == "ready" for group in groups for rank in group.ranks.values())

    @staticmethod
    def _is_idle(rank: Member) -> bool:
        """A rank that has just begun has no heartbeat yet, and no blocks in it."""
        blocks = rank.load.blocks
        return blocks.held == 0 < blocks.total and rank.load.running == rank.load.waiting == 0

    def _launch(self, spec: GroupSpec, rank: int) -> WorkerLaunch:
        return WorkerLaunch(
            role=spec.role,
            group=spec.group,
            rank=rank,
            model=ModelLaunch(str(self._model), "float32", load_facts(self._model).max_context),
            role_section=self._section(spec),
            kv_cache=self._cache(spec),
            kv_transfer=self._kv_transfer,
            device=self._device,
            control=self._control.address,
            secret=SECRET,
            host=HOST,
        )

    def _section(self, spec: GroupSpec) -> AnyRoleSection:
        sizes = {
            "tensor_parallel": spec.tensor_parallel,
            "batch_tokens": self._batch_tokens,
            "batch_requests": self._batch_requests,
        }
        if spec.role == "prefill":
            return PrefillSection(**sizes)
        kind = DecodeSection if spec.role == "decode" else ColocatedSection
        return kind(**sizes, growth_tokens=self._growth_tokens)

    def _cache(self, spec: GroupSpec) -> CacheLaunch:
        is_decode = spec.role == "decode"
        memory_bytes = self._decode_memory_bytes if is_decode else self._memory_bytes
        return CacheLaunch(memory_bytes, 0.0, self._block_sizes[is_decode], prefix_caching=True)

    async def _open_router(self) -> None:
        facts = load_facts(self._model)
        launch = RouterLaunch(
            section=RouterSection(policy="round_robin", canary_s=0),
            control_host=HOST,
            model_folder=str(self._model),
            model_name="test",
            max_context=facts.max_context,
            vocab_size=facts.vocab_size,
            groups=self._groups,
            is_fetching=self._kv_transfer.min_fetch_tokens > 0,
        )
        self.controller = WatchedController(launch, self._watch)
        self._control = ControlPlane(self.controller, HOST, SECRET)
        self._control.start()

    def _start_rank(self, launch: WorkerLaunch) -> None:
        self._start(self._live, launch)

    def _live(self, launch: WorkerLaunch) -> None:
        try:
            run_worker(launch)
        except BaseException as error:
            self.errors.append(error)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _on_loop(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)
