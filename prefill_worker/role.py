"""The prefill role of a group's leader: first come, first computed, in chunks that fill the token budget.

A job is waiting (no blocks yet), computing, or computed: its first token went to the client and its blocks are held
until decode has committed to their content, or the attempt is aborted. Nothing is sent without a grant; with one, what
is computed of a prompt leaves while the rest is being computed. What decode holds already may be fetched (fetcher.py).
"""

import time
from collections import deque
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.prefix_hash import HashChain, chain_root
from engine.role import Outlet
from engine.sampler import Drawn
from engine.sequence import Chunk, Sequence
from prefill_worker.fetcher import Fetcher
from prefill_worker.outbox import Outbox
from protocol.errors import FailureCode
from protocol.identity import Attempt
from protocol.messages import Abort, AnyMessage, Committed, Failed, Grant, Handoff, Prefill, TokenUpdate, Unfetched
from protocol.orders import AnyReport, Broken


@dataclass(eq=False)
class Job:
    """One prompt on its way through this role."""

    prefill: Prefill
    sequence: Sequence | None = None
    grant: Grant | None = None
    is_sending: bool = False
    computed_at: float | None = None  # monotonic


class PrefillRole:
    """See engine.role.Role."""

    def __init__(
        self,
        pool: BlockPool,
        outbox: Outbox,
        fetcher: Fetcher,
        outlet: Outlet,
        model_hash: str,
        max_computing: int,
    ) -> None:
        self._pool = pool
        self._outbox = outbox
        self._fetcher = fetcher
        self._outlet = outlet
        self._model_hash = model_hash
        self._max_computing = max_computing
        self._jobs: dict[Attempt, Job] = {}
        self._waiting: deque[Job] = deque()
        self._computing: list[Job] = []
        self._counters = {"handoffs": 0, "handoff_exposed_us": 0}

    @property
    def counters(self) -> dict[str, int]:
        return {**self._counters, **self._fetcher.counters}

    @property
    def num_running(self) -> int:
        return len(self._computing)

    @property
    def num_waiting(self) -> int:
        return len(self._jobs) - len(self._computing)

    def receive(self, message: AnyMessage) -> None:
        match message:
            case Prefill():
                self._enqueue(message)
            case Grant() if (job := self._jobs.get(message.attempt)) and job.grant is None:
                job.grant = message
                if job.sequence is not None:
                    self._fetcher.granted(job.prefill, job.sequence, message)
                self._send_computed(job)
            case Unfetched():
                self._fetcher.fail(message.attempt)
            case Committed():
                self._count_handoff(message.attempt)
                self._drop(message.attempt)
            case Abort():
                self._outbox.drop(message.attempt)
                self._drop(message.attempt)

    def heed(self, report: AnyReport) -> None:
        self._fetcher.heed(report)
        if isinstance(report, Broken) and report.attempt in self._jobs:
            self._fail(report.attempt, "transfer_failed", f"sending KV failed on rank {report.rank}: {report.reason}")

    def schedule(self, num_tokens: int) -> list[Chunk]:
        self._admit()
        chunks: list[Chunk] = []
        for job in self._computing:
            if num_tokens <= 0:
                break
            assert job.sequence is not None
            if not job.sequence.num_drawing and not self._fetcher.is_open(job.sequence.attempt):
                chunks.append(job.sequence.next_chunk(num_tokens))
                num_tokens -= chunks[-1].num_tokens
        return chunks

    def commit(self, chunk: Chunk, drawn: Drawn | None) -> None:
        sequence = chunk.sequence
        if sequence.attempt not in self._jobs:
            return
        if drawn is not None and not drawn.is_valid:
            self._fail(sequence.attempt, "model_output_invalid", "the model's output for this prompt is not finite")
            return
        self._pool.name_blocks(sequence.hold, sequence.block_names)
        job = self._jobs[sequence.attempt]
        if drawn is not None:
            self._finish_computing(job, sequence, drawn)
        else:
            self._send_computed(job)

    def fail(self, chunk: Chunk, code: FailureCode, message: str) -> None:
        self._fail(chunk.sequence.attempt, code, message)

    def drop_all(self) -> None:
        for attempt in list(self._jobs):
            self._outbox.drop(attempt)
            self._drop(attempt)

    def _enqueue(self, prefill: Prefill) -> None:
        num_tokens = len(prefill.request.prompt_token_ids)
        if self._pool.blocks_for(num_tokens) > self._pool.num_blocks:
            text = f"a prompt of {num_tokens} tokens; this cache holds {self._pool.num_blocks * self._pool.block_size}"
            self._outlet.send(Failed(prefill.attempt, "kv_cache_too_small", text))
            return
        job = self._jobs[prefill.attempt] = Job(prefill)
        self._waiting.append(job)

    def _admit(self) -> None:
        """In order of arrival and never past one that must wait: see docs/decisions/0003-no-deadlock.md."""
        while self._waiting and len(self._computing) < self._max_computing:
            if not self._start(self._waiting[0]):
                return
            self._computing.append(self._waiting.popleft())

    def _start(self, job: Job) -> bool:
        request, attempt = job.prefill.request, job.prefill.attempt
        prompt = request.prompt_token_ids
        chain = HashChain(chain_root(self._model_hash, request.salt), self._pool.block_size)
        names = chain.of(prompt, len(prompt) - 1)  # the last token is always computed: its logits are wanted
        hold = self._outbox.claim(attempt, names, self._pool.blocks_for(len(prompt)))
        if hold is None:
            return False
        job.sequence = Sequence(attempt, request, hold, chain, hold.num_cached * self._pool.block_size)
        self._fetcher.admit(job.prefill, job.sequence, job.grant)
        return True

    def _finish_computing(self, job: Job, sequence: Sequence, drawn: Drawn) -> None:
        job.computed_at = time.monotonic()
        self._computing.remove(job)
        sequence.token_ids.append(drawn.token_id)
        self._outlet.emit(self._first_update(sequence, drawn))
        if sequence.finish_reason:
            self._outbox.drop(sequence.attempt)
            self._drop(sequence.attempt)
        else:
            self._send_computed(job)

    def _first_update(self, sequence: Sequence, drawn: Drawn) -> TokenUpdate:
        return TokenUpdate(
            sequence.attempt,
            index=0,
            token_id=drawn.token_id,
            logprobs=drawn.logprobs,
            finish_reason=sequence.finish_reason,
            num_cached_tokens=sequence.hold.num_cached * self._pool.block_size,
        )

    def _send_computed(self, job: Job) -> None:
        """Send what is computed and granted; when that is the whole prompt, hand it off."""
        sequence, grant, destination = job.sequence, job.grant, job.prefill.destination
        if sequence is None or grant is None or self._fetcher.is_open(sequence.attempt):
            return
        first_position = grant.num_cached_tokens
        if not 0 <= first_position <= sequence.num_prompt_tokens:
            text = f"decode granted from position {first_position} of {sequence.num_prompt_tokens}"
            self._fail(sequence.attempt, "transfer_failed", text)
            return
        if job.is_sending:
            self._outbox.send_more(sequence)
        else:
            self._outbox.send(sequence, destination, first_position)
            job.is_sending = True
        if job.computed_at is not None:
            manifest = self._outbox.manifest(sequence, destination, first_position)
            self._outlet.send(Handoff(sequence.attempt, sequence.token_ids[-1], manifest))

    def _count_handoff(self, attempt: Attempt) -> None:
        """What of a handoff computing did not hide: from the last token computed to decode's commitment."""
        job = self._jobs.get(attempt)
        if job and job.computed_at is not None:
            self._counters["handoffs"] += 1
            self._counters["handoff_exposed_us"] += int((time.monotonic() - job.computed_at) * 1e6)

    def _fail(self, attempt: Attempt, code: FailureCode, message: str) -> None:
        self._outlet.send(Failed(attempt, code, message))
        self._outbox.drop(attempt)
        self._drop(attempt)

    def _drop(self, attempt: Attempt) -> None:
        job = self._jobs.pop(attempt, None)
        if job is None:
            return
        self._fetcher.forget(attempt)
        if job.sequence is None:
            self._waiting.remove(job)
        else:
            job.sequence.hold.release()
        if job in self._computing:
            self._computing.remove(job)
