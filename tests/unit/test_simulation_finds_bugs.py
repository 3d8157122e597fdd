"""Mistakes that others made, planted into production code: the simulation must find every one of them.

A plant is a monkeypatch of production code, and a pattern of what the simulation says about it. Seeds are tried until
one fails; that none does within MAX_SEEDS means that the simulation is blind to that mistake.
"""

import dataclasses
from collections.abc import Callable

import msgspec
import pytest

from decode_worker.inbox import RemoteInbox
from decode_worker.mover import ReceivingMover
from decode_worker.prefix_server import RemotePrefixServer
from decode_worker.reservation import Reservation
from decode_worker.role import DecodeRole
from engine import step_loop
from engine.block_pool import Hold
from engine.sampler import SamplingRow
from engine.sequence import Chunk, Sequence
from kv_transfer import staging
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.transport import Arrival
from prefill_worker.admission import Job
from prefill_worker.fetcher import RemoteFetcher
from prefill_worker.outbox import RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol.codec import decode
from protocol.messages import Abort, AnyMessage, Failed, Fetch, Handoff, TokenUpdate, Unfetched
from protocol.orders import AnyReport, SendBlocks
from router.control.attempts import Attempts
from router.control.course import Course
from router.control.events import Outcome
from router.control.lifecycle import Lifecycle, Side
from tests.sampling import WrittenText
from tests.simulation.planting import LEAK, MAX_SEEDS, STUCK, WRONG, first_failure
from tests.simulation.scenario import run_seed
from worker.control_link import ControlLink

Patch = pytest.MonkeyPatch


def decode_frees_on_abort_and_lets_the_transfer_live(patch: Patch) -> None:
    patch.setattr(RemoteInbox, "drop", lambda self, attempt: None)


def prefill_frees_what_was_not_fetched_in_time(patch: Patch) -> None:
    """The hold goes back to the pool a few steps after the handoff, although decode has not committed."""
    original_send, original_schedule = RemoteOutbox.send, PrefillRole.schedule
    lent: dict[Hold, int] = {}
    let_go: set[Hold] = set()

    def send(self: RemoteOutbox, sequence, destination, first_position: int):
        lent[sequence.hold] = 0
        return original_send(self, sequence, destination, first_position)

    def schedule(self: PrefillRole, num_tokens: int):
        for hold in [hold for hold in lent if not hold._is_released]:
            lent[hold] += 1
            if lent[hold] == 3:
                hold._pool._release(hold.block_ids)
                let_go.add(hold)
        return original_schedule(self, num_tokens)

    def release(self: Hold) -> None:
        self._is_released = True
        if self not in let_go:
            self._pool._release(self.block_ids)

    patch.setattr(RemoteOutbox, "send", send)
    patch.setattr(PrefillRole, "schedule", schedule)
    patch.setattr(Hold, "release", release)


def a_token_that_is_being_drawn_is_forgotten(patch: Patch) -> None:
    """The step after it is scheduled as if there were none under way."""
    original = Sequence.land

    def land(self: Sequence, chunk: Chunk) -> None:
        original(self, chunk)
        self.num_drawing = 0

    patch.setattr(Sequence, "land", land)


def decode_frees_what_did_not_come_in_time(patch: Patch) -> None:
    """A reservation is given up after two turns, although frames for it may still be on their way."""
    original = DecodeRole.schedule
    waited: dict[Reservation, int] = {}

    def schedule(self: DecodeRole, num_tokens: int):
        for reservation in list(self._reservations.values()):
            if reservation.handoff and not reservation.sequence:
                waited[reservation] = waited.get(reservation, 0) + 1
                if waited[reservation] == 2:
                    del self._reservations[reservation.attempt]
                    reservation.hold.release()
                    self._outlet.send(Failed(reservation.attempt, "transfer_failed", "too late"))
        return original(self, num_tokens)

    patch.setattr(DecodeRole, "schedule", schedule)


def nobody_looks_at_epochs(patch: Patch) -> None:
    patch.setattr(ControlLink, "_parse", lambda self, data: decode(data).message)


def nobody_looks_at_attempts(patch: Patch) -> None:
    """A frame goes to whichever transfer is waiting for one of its kind."""
    original = KVReceiver._use

    def use(self: KVReceiver, arrival: Arrival) -> bool:
        header = arrival.header
        for attempt, transfer in self._transfers.items():
            if transfer.frames.get((header.source_rank, header.piece.index)) == (header.piece, header.num_frames):
                arrival = arrival._replace(header=type(header)(attempt, *[getattr(header, n) for n in _REST]))
                break
        return original(self, arrival)

    patch.setattr(KVReceiver, "_use", use)


_REST = ("source_rank", "destination_rank", "num_frames", "piece", "digest_kind", "unit_digests", "number")


def decode_grants_before_its_ranks_expect(patch: Patch) -> None:
    original = DecodeRole._start

    def start(self: DecodeRole, reservation: Reservation) -> bool:
        has_started = original(self, reservation)
        reservation.unready.clear()
        return has_started

    patch.setattr(DecodeRole, "_start", start)


def decode_commits_before_its_ranks_have_everything(patch: Patch) -> None:
    original = DecodeRole._take_handoff

    def take_handoff(self: DecodeRole, reservation: Reservation, handoff: Handoff) -> None:
        reservation.incomplete.clear()
        original(self, reservation, handoff)

    patch.setattr(DecodeRole, "_take_handoff", take_handoff)


def a_rank_is_content_with_one_frame_less(patch: Patch) -> None:
    original = KVReceiver._finish_if_whole

    def finish(self: KVReceiver, attempt) -> None:
        transfer = self._transfers[attempt]
        if len(transfer.missing) < len(transfer.frames) and len(transfer.missing) == 1:
            transfer.missing.clear()
        original(self, attempt)

    patch.setattr(KVReceiver, "_finish_if_whole", finish)


def damaged_frames_are_taken(patch: Patch) -> None:
    patch.setattr(staging, "check_payload", lambda header, payload: None)


def a_hold_is_released_twice(patch: Patch) -> None:
    original = Hold.release

    def release(self: Hold) -> None:
        original(self)
        self._pool._release(self.block_ids[:1])

    patch.setattr(Hold, "release", release)


def prefill_ignores_aborts(patch: Patch) -> None:
    original = PrefillRole.receive

    def receive(self: PrefillRole, message: AnyMessage) -> None:
        if not isinstance(message, Abort):
            original(self, message)

    patch.setattr(PrefillRole, "receive", receive)


def prefill_does_not_say_that_sending_failed(patch: Patch) -> None:
    patch.setattr(PrefillRole, "heed", lambda self, report: None)


def the_router_forgets_that_prefill_holds_something(patch: Patch) -> None:
    original = Lifecycle._end

    def end(self: Lifecycle, outcome, keep=None):
        self.holders.discard(Side.PREFILL)
        return original(self, outcome, keep)

    patch.setattr(Lifecycle, "_end", end)


def a_leader_sleeps_over_its_own_report(patch: Patch) -> None:
    """The report is there, but nothing wakes whoever should read it."""
    original = ReceivingMover.poll

    def poll(self: ReceivingMover) -> list[AnyReport]:
        reports = original(self)
        self._reports, kept = [], self._reports
        self._late, late = kept or reports, getattr(self, "_late", [])
        return late

    patch.setattr(ReceivingMover, "poll", poll)


def prefill_names_blocks_before_they_are_computed(patch: Patch) -> None:
    original = PrefillRole._start

    def start(self: PrefillRole, job: Job, hold: Hold) -> None:
        original(self, job, hold)
        self._pool.name_blocks(hold, job.chain.of(job.prefill.request.prompt_token_ids, job.sequence.num_prompt_tokens))

    patch.setattr(PrefillRole, "_start", start)


def prefill_sends_what_is_not_computed_yet(patch: Patch) -> None:
    original = KVSender.send

    def send(self: KVSender, order: SendBlocks) -> None:
        original(self, msgspec.structs.replace(order, num_computed=None))

    patch.setattr(KVSender, "send", send)


def prefill_does_not_say_that_more_is_computed(patch: Patch) -> None:
    patch.setattr(RemoteOutbox, "send_more", lambda self, sequence: None)


def prefill_takes_one_ranks_word_for_a_whole_fetch(patch: Patch) -> None:
    finish = RemoteFetcher._finish_when_complete

    def finish_early(self: RemoteFetcher, fetch, rank: int) -> None:
        fetch.incomplete.clear()
        finish(self, fetch, rank)

    patch.setattr(RemoteFetcher, "_finish_when_complete", finish_early)


def prefill_goes_on_behind_what_it_has_only_asked_for(patch: Patch) -> None:
    ask = RemoteFetcher._ask_when_ready

    def ask_and_go_on(self: RemoteFetcher, fetch, rank: int) -> None:
        ask(self, fetch, rank)
        if not fetch.unready:
            fetch.incomplete.clear()
            self._finish_when_complete(fetch, rank)

    patch.setattr(RemoteFetcher, "_ask_when_ready", ask_and_go_on)


def decode_serves_no_fetch(patch: Patch) -> None:
    """No mistake: whatever it is asked for, it says that it cannot be."""

    def serve(self: RemotePrefixServer, fetch: Fetch, *_: object) -> bool:
        self._outlet.send(Unfetched(fetch.attempt, "not now"))
        return False

    patch.setattr(RemotePrefixServer, "serve", serve)


def prefill_goes_on_expecting_a_fetch_that_it_has_given_up(patch: Patch) -> None:
    decode_serves_no_fetch(patch)
    patch.setattr(RemoteFetcher, "fail", lambda self, attempt: self.forget(attempt))


def prefill_frees_blocks_that_are_fetched_into(patch: Patch) -> None:
    patch.setattr(RemoteOutbox, "drop", lambda self, attempt: None)


def the_next_attempt_begins_with_something_else(patch: Patch) -> None:
    original = Course.fail

    def fail(self: Course, outcome: Outcome, now_s: float) -> Outcome | None:
        asked, index = self.request, self.life.next_index
        ended = original(self, outcome, now_s)
        self.request = msgspec.structs.replace(asked, generated_token_ids=(0,) * index)
        return ended

    patch.setattr(Course, "fail", fail)


def draws_are_counted_from_the_new_prompt(patch: Patch) -> None:
    original = step_loop._sampling_rows

    def sampling_rows(chunk: Chunk) -> list[SamplingRow]:
        num_generated = len(chunk.sequence.request.generated_token_ids)
        return [dataclasses.replace(row, position=row.position - num_generated) for row in original(chunk)]

    patch.setattr(step_loop, "_sampling_rows", sampling_rows)


def penalties_are_counted_from_the_new_prompt(patch: Patch) -> None:
    original = step_loop._sampling_rows

    def sampling_rows(chunk: Chunk) -> list[SamplingRow]:
        sequence = chunk.sequence
        known = sequence.num_known_tokens
        if not hasattr(sequence, "text"):
            sequence.text = WrittenText(sequence.token_ids[:known], sequence.token_ids[known:])
        return [dataclasses.replace(row, text=sequence.text) for row in original(chunk)]

    patch.setattr(step_loop, "_sampling_rows", sampling_rows)


def a_late_token_of_an_old_attempt_is_delivered(patch: Patch) -> None:
    original = Attempts.receive

    def receive(self: Attempts, sender: int, message: AnyMessage):
        course = self._courses.get(message.attempt.request_id)
        if isinstance(message, TokenUpdate) and course and course.life:
            attempt = course.attempt
            is_first = message.index == len(course.request.generated_token_ids)
            sender = attempt.prefill_epoch if is_first else attempt.decode_epoch
            message = msgspec.structs.replace(message, attempt=attempt)
        return original(self, sender, message)

    patch.setattr(Attempts, "receive", receive)


def a_quarantine_is_forgotten(patch: Patch) -> None:
    patch.setattr(Course, "_crash", lambda self: None)


def a_request_that_waits_is_forgotten(patch: Patch) -> None:
    patch.setattr(Attempts, "resume", lambda self: [])


PLANTS: list[tuple[Callable[[Patch], None], str, str]] = [
    (decode_frees_on_abort_and_lets_the_transfer_live, WRONG, "slow frames"),
    (prefill_frees_what_was_not_fetched_in_time, WRONG, ""),
    (decode_frees_what_did_not_come_in_time, WRONG, "late frames"),
    (nobody_looks_at_epochs, LEAK, "crash"),
    (nobody_looks_at_attempts, WRONG, ""),
    (decode_grants_before_its_ranks_expect, STUCK, ""),
    (decode_commits_before_its_ranks_have_everything, WRONG, ""),
    (a_rank_is_content_with_one_frame_less, WRONG, ""),
    (damaged_frames_are_taken, WRONG, "damaged"),
    (a_hold_is_released_twice, "AssertionError", ""),
    (prefill_ignores_aborts, LEAK, ""),
    (prefill_does_not_say_that_sending_failed, STUCK, "damaged"),
    (the_router_forgets_that_prefill_holds_something, LEAK, ""),
    (a_leader_sleeps_over_its_own_report, "slept although", ""),
    (prefill_names_blocks_before_they_are_computed, WRONG, ""),
    (prefill_sends_what_is_not_computed_yet, WRONG, ""),
    (prefill_does_not_say_that_more_is_computed, STUCK, ""),
    (prefill_takes_one_ranks_word_for_a_whole_fetch, WRONG, ""),
    (prefill_goes_on_behind_what_it_has_only_asked_for, WRONG, "slow frames"),
    (prefill_goes_on_expecting_a_fetch_that_it_has_given_up, LEAK, ""),
    (prefill_frees_blocks_that_are_fetched_into, WRONG, "slow frames"),
    (a_token_that_is_being_drawn_is_forgotten, WRONG + "|AssertionError", ""),
    (the_next_attempt_begins_with_something_else, WRONG, "crash"),
    (draws_are_counted_from_the_new_prompt, WRONG, "crash"),
    (penalties_are_counted_from_the_new_prompt, WRONG, "crash"),
    (a_late_token_of_an_old_attempt_is_delivered, STUCK, ""),
    (a_quarantine_is_forgotten, "lost to poison|never ended", "poison"),
    (a_request_that_waits_is_forgotten, STUCK, "crash"),
]
"""plant, what the simulation must say, and the faults without which it would only take longer to find."""


def test_fetches_that_are_refused_are_no_failure(monkeypatch: Patch) -> None:
    decode_serves_no_fetch(monkeypatch)
    for seed in range(300):
        run_seed(seed)


@pytest.mark.parametrize(("plant", "says", "faults"), PLANTS, ids=[plant.__name__ for plant, *_ in PLANTS])
def test_the_simulation_finds_it(plant: Callable[[Patch], None], says: str, faults: str, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert first_failure(says, faults), f"no failure that says {says} within {MAX_SEEDS} seeds"
