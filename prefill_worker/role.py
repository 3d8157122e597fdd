"""The prefill role of a group's leader: computes prompts in chunks that fill the token budget, and hands them off.

It is prefill's scheduler; computing in chunks is called chunked prefill.
A job is waiting (no blocks yet), computing, or computed: its first token went to the client and its blocks are held
until decode has committed to their content, or the attempt is aborted. Nothing is sent without a grant; with one, what
is computed of a prompt leaves while the rest is being computed. Without one a job may have to give up its blocks and
start again (prefill_worker/admission.py); its first token is kept, and never drawn or sent a second time. What decode
holds already may be fetched (prefill_worker/fetcher.py).
"""

import time

from engine.block_pool import BlockPool, Hold
from engine.prefix_hash import HashChain, chain_root
from engine.role import Outlet
from engine.sampler import Drawn
from engine.sequence import Chunk, Sequence
from prefill_worker.admission import Admission, Job
from prefill_worker.fetcher import Fetcher
from prefill_worker.outbox import Outbox
from protocol.errors import FailureCode
from protocol.identity import Attempt
from protocol.messages import (
    MAX_POSITIONS,
    Abort,
    AnyMessage,
    Committed,
    Failed,
    Grant,
    Handoff,
    Prefill,
    PromptLogprobs,
    TokenUpdate,
    Unfetched,
)
from protocol.orders import AnyReport, Broken


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
        self._admission = Admission(outbox, self._give_up)
        self._computing: list[Job] = []
        self._num_handoffs = self._handoff_exposed_us = self._num_duplicates = 0

    @property
    def counters(self) -> dict[str, int]:
        return {
            "duplicate_requests": self._num_duplicates,
            "handoffs": self._num_handoffs,
            "handoff_exposed_us": self._handoff_exposed_us,
            "prompts_given_up": self._admission.num_given_up,
            **self._fetcher.counters,
        }

    @property
    def num_running(self) -> int:
        return len(self._computing)

    @property
    def num_waiting(self) -> int:
        return len(self._jobs) - len(self._computing)

    def receive(self, message: AnyMessage) -> None:
        match message:
            case Prefill() if message.attempt in self._jobs:  # taking it would lose the first one's blocks
                self._num_duplicates += 1
            case Prefill():
                self._enqueue(message)
            case Grant() if (job := self._jobs.get(message.attempt)) and job.grant is None:
                job.grant = message
                self._admission.grant(job)
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
        for job in sorted(self._computing, key=lambda job: job.grant is None):
            sequence = job.sequence
            assert sequence is not None
            if num_tokens <= 0 or len(chunks) == self._max_computing:
                break
            num_left = sequence.num_known_tokens - sequence.num_launched
            if num_left and not self._fetcher.is_open(sequence.attempt):
                chunks.append(self._next_chunk(sequence, min(num_tokens, num_left)))
                num_tokens -= chunks[-1].num_tokens
        return chunks

    def _next_chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        """Where logits of every position are wanted, there are no more of them than a step of decode has.

        Once the first token is known all of them were said, though the KV may have been given up since.
        """
        is_known = len(sequence.token_ids) > sequence.num_known_tokens
        if is_known or not sequence.request.has_prompt_logprobs:
            return sequence.next_chunk(num_tokens)
        return sequence.next_chunk(min(num_tokens, self._max_computing), wants_all=True)

    def commit(self, chunk: Chunk, drawn: list[Drawn]) -> None:
        sequence = chunk.sequence
        job = self._jobs.get(sequence.attempt)
        if job is None or job.sequence is not sequence:  # over, or given up while the step was under way
            return
        if not all(token.is_valid for token in drawn):
            self._fail(sequence.attempt, "model_output_invalid", "the model's output for this prompt is not finite")
            return
        self._pool.name_blocks(sequence.hold, sequence.block_names)
        if sequence.num_computed == sequence.num_known_tokens:
            self._computing.remove(job)
            job.computed_at = time.monotonic()
        if len(drawn) > chunk.is_drawn:
            self._say_prompt_logprobs(chunk, drawn)
        if chunk.is_drawn:
            self._say_first_token(job, sequence, drawn[-1])
        if sequence.finish_reason:
            self._outbox.drop(sequence.attempt)
            self._drop(sequence.attempt)
        else:
            self._send_computed(job)

    def fail(self, chunk: Chunk, code: FailureCode, message: str) -> None:
        self._fail(chunk.sequence.attempt, code, message)

    def drop_all(self) -> None:
        for attempt in list(self._jobs):
            self._outbox.drop(attempt)
            self._drop(attempt)

    def _enqueue(self, prefill: Prefill) -> None:
        num_tokens = prefill.request.num_known_tokens
        if self._pool.blocks_for(num_tokens) > self._pool.num_blocks:
            text = f"a prompt of {num_tokens} tokens; this cache holds {self._pool.num_blocks * self._pool.block_size}"
            self._outlet.send(Failed(prefill.attempt, "kv_cache_too_small", text))
            return
        chain = HashChain(chain_root(self._model_hash, prefill.request.salt), self._pool.block_size)
        job = self._jobs[prefill.attempt] = Job(prefill, chain, self._pool.blocks_for(num_tokens))
        self._admission.enter(job)

    def _admit(self) -> None:
        """A prompt with a grant waits for a place only while others with a grant have taken all places."""
        while self._num_rivals() < self._max_computing and (admitted := self._admission.admit()):
            self._start(*admitted)

    def _num_rivals(self) -> int:
        rivals = self._computing
        return sum(job.grant is not None for job in rivals) if self._admission.is_granted_next else len(rivals)

    def _start(self, job: Job, hold: Hold) -> None:
        prefill, num_cached = job.prefill, hold.num_cached * self._pool.block_size
        known = [] if job.first_token_id is None else [job.first_token_id]
        job.sequence = Sequence(prefill.attempt, prefill.request, hold, job.chain, num_cached, known)
        self._computing.append(job)
        self._fetcher.admit(prefill, job.sequence, job.grant)
        self._send_computed(job)  # what was cached; of the rest, every layer as soon as it is there

    def _give_up(self, job: Job) -> None:
        """Let go of blocks for somebody else, without a grant, so that nothing of them is on its way."""
        assert job.sequence is not None
        assert not job.is_sending
        self._fetcher.forget(job.prefill.attempt)
        job.sequence.hold.release()
        if job in self._computing:
            self._computing.remove(job)
        job.sequence = job.computed_at = None

    def _say_prompt_logprobs(self, chunk: Chunk, drawn: list[Drawn]) -> None:
        given = drawn[:-1] if chunk.is_drawn else drawn
        logprobs = tuple(token.logprobs for token in given if token.logprobs is not None)
        for start in range(0, len(logprobs), MAX_POSITIONS):
            told = logprobs[start : start + MAX_POSITIONS]
            self._outlet.send(PromptLogprobs(chunk.sequence.attempt, chunk.wanted.start + 1 + start, told))

    def _say_first_token(self, job: Job, sequence: Sequence, drawn: Drawn) -> None:
        job.first_token_id = drawn.token_id
        sequence.token_ids.append(drawn.token_id)
        self._outlet.emit(self._first_update(sequence, drawn))

    def _first_update(self, sequence: Sequence, drawn: Drawn) -> TokenUpdate:
        num_cached_tokens = sequence.hold.num_cached * self._pool.block_size
        return TokenUpdate(
            sequence.attempt,
            index=len(sequence.output_token_ids) - 1,
            token_id=drawn.token_id,
            logprobs=drawn.logprobs,
            finish_reason=sequence.finish_reason,
            num_cached_tokens=0 if sequence.request.generated_token_ids else num_cached_tokens,
        )

    def _send_computed(self, job: Job) -> None:
        """Send what is computed and granted; when that is the whole prompt, hand it off."""
        sequence, grant, destination = job.sequence, job.grant, job.prefill.destination
        if sequence is None or grant is None or self._fetcher.is_open(sequence.attempt):
            return
        first_position = grant.num_cached_tokens
        if not 0 <= first_position <= sequence.num_known_tokens:
            text = f"decode granted from position {first_position} of {sequence.num_known_tokens}"
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
            self._num_handoffs += 1
            self._handoff_exposed_us += int((time.monotonic() - job.computed_at) * 1e6)

    def _fail(self, attempt: Attempt, code: FailureCode, message: str) -> None:
        self._outlet.send(Failed(attempt, code, message))
        self._outbox.drop(attempt)
        self._drop(attempt)

    def _drop(self, attempt: Attempt) -> None:
        job = self._jobs.pop(attempt, None)
        if job is None:
            return
        self._fetcher.forget(attempt)
        self._admission.leave(job)
        if job.sequence is not None:
            job.sequence.hold.release()
        if job in self._computing:
            self._computing.remove(job)
