"""The decode role of a group's leader: reserves room, commits arrived prompts, and runs everything that is running.

It is decode's scheduler: continuous batching, for every step's batch is made anew of the sequences that run.
A reservation is waiting (no blocks yet), arriving (its ranks expect frames), running, or parked. Its blocks are enough
for the prompt from the start; whether for all its growth, and what happens when they are not, is
decode_worker/running.py's business. A prompt is used only when every rank has checked every frame and the handoff's
manifest equals the plan's.
"""

from collections import deque

from decode_worker.inbox import Inbox
from decode_worker.prefix_server import PrefixServer
from decode_worker.reservation import Reservation
from decode_worker.running import Running
from engine.block_pool import BlockPool
from engine.prefix_hash import HashChain, chain_root
from engine.role import Outlet
from engine.sampler import Drawn
from engine.sequence import Chunk, Sequence
from protocol.errors import FailureCode
from protocol.identity import Attempt
from protocol.messages import (
    Abort,
    AnyMessage,
    Committed,
    Failed,
    Fetch,
    FinishReason,
    Grant,
    Handoff,
    Reserve,
    TokenUpdate,
)
from protocol.orders import AnyReport, Broken, Expecting, Received


class DecodeRole:
    """See engine.role.Role."""

    def __init__(
        self,
        pool: BlockPool,
        inbox: Inbox,
        prefixes: PrefixServer,
        outlet: Outlet,
        running: Running,
        model_hash: str,
        max_running: int,
    ) -> None:
        self._pool = pool
        self._inbox = inbox
        self._prefixes = prefixes
        self._outlet = outlet
        self._model_hash = model_hash
        self._max_running = max_running
        self._reservations: dict[Attempt, Reservation] = {}
        self._waiting: deque[Reservation] = deque()
        self._running = running
        self._num_reserved = self._num_duplicates = 0

    @property
    def counters(self) -> dict[str, int]:
        return {"duplicate_requests": self._num_duplicates, **self._running.counters}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._reservations) - len(self._running)

    def receive(self, message: AnyMessage) -> None:
        match message:
            case Reserve() if message.attempt in self._reservations:  # taking it would lose the first one's blocks
                self._num_duplicates += 1
            case Reserve():
                self._enqueue(message)
            case Handoff() if (reservation := self._reservations.get(message.attempt)) and not reservation.handoff:
                self._take_handoff(reservation, message)
            case Fetch() if (reservation := self._reservations.get(message.attempt)) and reservation.is_granted:
                self._serve(message, reservation)
            case Abort():
                self._drop(message.attempt)

    def heed(self, report: AnyReport) -> None:
        self._prefixes.heed(report)
        if not isinstance(report, Expecting | Received | Broken):
            return
        reservation = self._reservations.get(report.attempt)
        if reservation is None or reservation.sequence is not None:
            return
        match report:
            case Expecting():
                reservation.unready.discard(report.rank)
                self._grant_when_ready(reservation)
            case Received():
                reservation.incomplete.discard(report.rank)
                self._commit_when_complete(reservation)
            case Broken():
                text = f"receiving KV failed on rank {report.rank}: {report.reason}"
                self._fail(reservation, "transfer_failed", text)

    def schedule(self, num_tokens: int) -> list[Chunk]:
        max_sequences = min(num_tokens, self._max_running)
        self._running.make_room(max_sequences)
        self._admit()
        return [sequence.next_chunk(1) for sequence in self._running.ready(max_sequences)]

    def commit(self, chunk: Chunk, drawn: list[Drawn]) -> None:
        sequence = chunk.sequence
        reservation = self._reservations.get(sequence.attempt)
        if reservation is None:
            return
        [token] = drawn
        if not token.is_valid:
            self._fail(reservation, "model_output_invalid", "the model's output for this request is not finite")
            return
        if reservation.hold and chunk.end % self._pool.block_size == 0:  # not parked while the step was under way
            self._pool.name_blocks(reservation.hold, sequence.block_names)
        sequence.token_ids.append(token.token_id)
        finish_reason = sequence.finish_reason
        self._emit(sequence, token, finish_reason)
        if finish_reason:
            self._drop(sequence.attempt)

    def fail(self, chunk: Chunk, code: FailureCode, message: str) -> None:
        self._fail(self._reservations[chunk.sequence.attempt], code, message)

    def drop_all(self) -> None:
        for attempt in list(self._reservations):
            self._drop(attempt)

    def _serve(self, fetch: Fetch, reservation: Reservation) -> None:
        if reservation.is_fetched:
            self._num_duplicates += 1
        elif reservation.hold and not reservation.handoff:  # after a handoff prefill has no use for it
            position = self._first_position(reservation)
            reservation.is_fetched = self._prefixes.serve(fetch, reservation.reserve, reservation.hold, position)

    def _enqueue(self, reserve: Reserve) -> None:
        request = reserve.request
        chain = HashChain(chain_root(self._model_hash, request.salt), self._pool.block_size)
        ranks = range(self._inbox.num_reporting)
        reservation = Reservation(reserve, self._num_reserved, chain, unready=set(ranks), incomplete=set(ranks))
        if self._pool.blocks_for(reservation.max_num_computed) > self._pool.num_blocks:
            text = (
                f"prompt and max_tokens are {request.max_num_tokens} tokens together; "
                f"this cache holds {self._pool.num_blocks * self._pool.block_size}"
            )
            self._outlet.send(Failed(reserve.attempt, "kv_cache_too_small", text))
            return
        self._num_reserved += 1
        self._reservations[reserve.attempt] = reservation
        self._waiting.append(reservation)
        self._admit()

    def _admit(self) -> None:
        """In order of arrival, and nobody while what runs lacks blocks: see docs/decisions/0003-no-deadlock.md."""
        while self._running.restore() and self._waiting and self._start(self._waiting[0]):
            self._grant_when_ready(self._waiting.popleft())

    def _start(self, reservation: Reservation) -> bool:
        names = reservation.chain.of_held(reservation.reserve.request)
        reservation.hold = self._pool.acquire(names, self._running.num_first_blocks(reservation))
        if reservation.hold is None:
            return False
        self._running.book(reservation)
        self._inbox.expect(reservation.reserve, reservation.hold, self._first_position(reservation))
        return True

    def _first_position(self, reservation: Reservation) -> int:
        assert reservation.hold is not None
        return reservation.hold.num_cached * self._pool.block_size

    def _grant_when_ready(self, reservation: Reservation) -> None:
        if not reservation.unready and not reservation.is_granted:
            reservation.is_granted = True
            self._outlet.send(Grant(reservation.attempt, self._first_position(reservation)))

    def _take_handoff(self, reservation: Reservation, handoff: Handoff) -> None:
        if reservation.hold is None:
            self._fail(reservation, "transfer_failed", "a handoff came before its grant")
            return
        wanted = self._inbox.manifest(reservation.reserve, self._first_position(reservation))
        if handoff.manifest != wanted:
            self._fail(reservation, "transfer_failed", f"the manifest is {handoff.manifest}, the plan says {wanted}")
            return
        reservation.handoff = handoff
        self._commit_when_complete(reservation)

    def _commit_when_complete(self, reservation: Reservation) -> None:
        if reservation.incomplete or reservation.handoff is None:
            return
        assert reservation.hold is not None
        reserve, handoff = reservation.reserve, reservation.handoff
        sequence = Sequence(
            reserve.attempt,
            reserve.request,
            reservation.hold,
            reservation.chain,
            num_computed=reserve.request.num_known_tokens,
            token_ids=[handoff.first_token_id],
        )
        self._pool.name_blocks(sequence.hold, sequence.block_names)
        reservation.sequence = sequence
        self._running.add(reservation)
        self._outlet.send(Committed(reserve.attempt))

    def _emit(self, sequence: Sequence, drawn: Drawn, finish_reason: FinishReason | None) -> None:
        index = len(sequence.token_ids) - sequence.num_prompt_tokens - 1
        self._outlet.emit(TokenUpdate(sequence.attempt, index, drawn.token_id, drawn.logprobs, finish_reason))

    def _fail(self, reservation: Reservation, code: FailureCode, message: str) -> None:
        self._outlet.send(Failed(reservation.attempt, code, message))
        self._drop(reservation.attempt)

    def _drop(self, attempt: Attempt) -> None:
        reservation = self._reservations.pop(attempt, None)
        if reservation is None:
            return
        if reservation.hold is None and reservation.sequence is None:
            self._waiting.remove(reservation)
            return
        self._running.remove(reservation)
        self._inbox.drop(attempt)
        if reservation.hold:
            reservation.hold.release()
