"""As test_simulation_finds_bugs.py, for mistakes about room: the outbox's limit, prompts that give way, parking."""

from collections.abc import Callable

import msgspec
import pytest

from decode_worker.running import Running
from engine.group import GroupRanks
from engine.parked_kv import ParkedCopy, ParkedKV
from engine.rank import Rank
from prefill_worker.admission import Admission, Job
from prefill_worker.role import PrefillRole
from protocol.orders import Discard, Park, Unpark
from tests.simulation.device import QueuedParkedKV
from tests.simulation.planting import MAX_SEEDS, STUCK, WRONG, first_failure
from tests.simulation.plants import a_sequence_is_parked_whose_chunk_is_on_its_way, nobody_is_parked

Patch = pytest.MonkeyPatch


def the_outbox_limit_keeps_granted_prompts_out_too(patch: Patch) -> None:
    """sglang #31473: what decode has room for waits for a place among what it has no room for."""
    original = Admission._claim
    patch.setattr(Admission, "_claim", lambda self, job: original(self, job) if self._has_place(job) else None)


def the_outbox_has_no_limit(patch: Patch) -> None:
    patch.setattr(Admission, "_has_place", lambda self, job: True)


def granted_prompts_wait_for_blocks_of_ungranted_ones(patch: Patch) -> None:
    patch.setattr(Admission, "_claim", lambda self, job: self._try(job))


def granted_prompts_queue_behind_ungranted_ones(patch: Patch) -> None:
    original = Admission.admit

    def admit(self: Admission):
        return original(self) if self._granted and not self._ungranted else _first_ungranted(self)

    def _first_ungranted(self: Admission):
        granted, self._granted = self._granted, type(self._granted)()
        admitted = original(self)
        self._granted = granted
        return admitted

    patch.setattr(Admission, "admit", admit)


def the_first_token_is_drawn_again_after_a_prompt_was_given_up(patch: Patch) -> None:
    original = PrefillRole._give_up

    def give_up(self: PrefillRole, job: Job) -> None:
        original(self, job)
        job.first_token_id = None

    patch.setattr(PrefillRole, "_give_up", give_up)


def what_is_being_sent_is_given_up(patch: Patch) -> None:
    original_grant, original_give_up = Admission.grant, PrefillRole._give_up

    def grant(self: Admission, job: Job) -> None:
        if job.sequence is None:
            original_grant(self, job)

    def give_up(self: PrefillRole, job: Job) -> None:
        job.is_sending = False
        original_give_up(self, job)

    patch.setattr(Admission, "grant", grant)
    patch.setattr(PrefillRole, "_give_up", give_up)


def copies_overtake_the_step_under_way(patch: Patch) -> None:
    """What that step computes is not in the copy, and what comes back may be overwritten by it."""
    patch.setattr(QueuedParkedKV, "execute", ParkedKV.execute)


def blocks_are_parked_after_they_were_let_go(patch: Patch) -> None:
    """The copy is made when somebody wants it back."""
    original = ParkedKV.execute

    def execute(self: ParkedKV, order) -> None:
        if isinstance(order, Park):
            self.__dict__.setdefault("late", {})[order.attempt] = order
            self._parked[order.attempt] = ParkedCopy(0, [])
            return
        if isinstance(order, Unpark):
            del self._parked[order.attempt]
            original(self, self.__dict__["late"].pop(order.attempt))
        original(self, order)

    patch.setattr(ParkedKV, "execute", execute)


def parked_kv_comes_back_into_the_blocks_where_it_was(patch: Patch) -> None:
    original = ParkedKV.execute
    places: dict = {}

    def execute(self: ParkedKV, order) -> None:
        if isinstance(order, Park):
            places[order.attempt] = order.block_ids
        if isinstance(order, Unpark):
            order = msgspec.structs.replace(order, block_ids=places[order.attempt])
        original(self, order)

    patch.setattr(ParkedKV, "execute", execute)


def followers_do_not_park(patch: Patch) -> None:
    original = Rank.execute

    def execute(self: Rank, order) -> None:
        if self._parked_kv._planes[0].data_ptr() in leaders or not isinstance(order, Park | Unpark | Discard):
            original(self, order)

    leaders: set[int] = set()
    original_order = GroupRanks.order

    def order(self: GroupRanks, order) -> None:
        leaders.add(self._own_rank._parked_kv._planes[0].data_ptr())
        original_order(self, order)

    patch.setattr(Rank, "execute", execute)
    patch.setattr(GroupRanks, "order", order)


def more_is_parked_than_was_allowed(patch: Patch) -> None:
    patch.setattr(Running, "book", lambda self, reservation: self._booked.update({reservation.attempt: 0}))


PLANTS: list[tuple[Callable[[Patch], None], str]] = [
    (the_outbox_limit_keeps_granted_prompts_out_too, STUCK),
    (the_outbox_has_no_limit, "blocks are ungranted"),
    (granted_prompts_wait_for_blocks_of_ungranted_ones, STUCK),
    (granted_prompts_queue_behind_ungranted_ones, STUCK),
    (the_first_token_is_drawn_again_after_a_prompt_was_given_up, STUCK),
    (what_is_being_sent_is_given_up, f"{WRONG}|sent once"),
    (nobody_is_parked, STUCK),
    (a_sequence_is_parked_whose_chunk_is_on_its_way, WRONG),
    (copies_overtake_the_step_under_way, WRONG),
    (blocks_are_parked_after_they_were_let_go, WRONG),
    (parked_kv_comes_back_into_the_blocks_where_it_was, WRONG),
    (followers_do_not_park, WRONG),
    (more_is_parked_than_was_allowed, "blocks are parked"),
]


@pytest.mark.parametrize(("plant", "says"), PLANTS, ids=[plant.__name__ for plant, *_ in PLANTS])
def test_the_simulation_finds_it(plant: Callable[[Patch], None], says: str, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert first_failure(says, ""), f"no failure that says {says} within {MAX_SEEDS} seeds"
