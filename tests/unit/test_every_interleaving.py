"""Everything that can happen in clusters of two or three requests, in every order: no foreign KV, no deadlock, no leak.

Breadth first, so that what goes wrong is told by the shortest way to it. tests/simulation/small_world.py says what is
production code here and what is abstracted.
"""

import gc
from collections.abc import Callable, Iterator

import msgspec
import pytest

from decode_worker.inbox import RemoteInbox
from decode_worker.role import DecodeRole
from decode_worker.running import Growth
from prefill_worker.admission import Admission, Job
from prefill_worker.outbox import RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol import identity
from protocol.orders import Park, Unpark
from router.control import course
from tests.simulation.plants import a_sequence_is_parked_whose_chunk_is_on_its_way, nobody_is_parked
from tests.simulation.search import explore
from tests.simulation.small_life import GROWING_REQUESTS, LONG_REQUESTS, Life, Limits, Violation
from tests.simulation.small_world import SmallWorld

MAX_STATES = 60_000
SMALL = Limits((2, 2))
Patch = pytest.MonkeyPatch


def growing(num_requests: int, **what_goes_wrong) -> SmallWorld:
    """Two requests begin with room for two tokens each, in four blocks, and need three in the end."""
    limits = Limits((2, 4), growth=Growth(1, 9))
    return SmallWorld(num_requests, limits, requests=GROWING_REQUESTS, **what_goes_wrong)


def parts(num_requests: int, **what_goes_wrong) -> SmallWorld:
    """Prompts that take two steps, so that a part leaves before the rest is computed."""
    return SmallWorld(num_requests, Limits((3, 3)), requests=LONG_REQUESTS, **what_goes_wrong)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setattr(identity, "new_epoch", lambda: 0)
    monkeypatch.setattr(course, "FIRST_PAUSE_S", 0.0)  # there is no clock here
    gc.freeze()  # or every collection of the copies made here would look through all imported modules too
    yield
    gc.unfreeze()


WORLDS = {
    "2x2, a cancel": (SmallWorld(2, Limits((2, 2)), num_cancels=1), 4_000),
    "1x2, both sides crash": (SmallWorld(1, Limits((2, 2)), num_crashes=(1, 1)), 16_000),
    "2x2, decode crashes": (SmallWorld(2, Limits((2, 2)), num_crashes=(0, 1)), 12_000),
    "3x1, decode crashes": (SmallWorld(3, Limits((1, 1), 2), num_crashes=(0, 1)), 8_000),
    "2x1, prefill crashes": (SmallWorld(2, Limits((1, 1), 2), num_crashes=(1, 0)), 17_000),
    "3x1, decode grants in any order": (SmallWorld(3, Limits((1, 1), 2, is_any_order=True)), 2_000),
    "3x1, in any order, nothing ahead of its grant": (SmallWorld(3, Limits((1, 1), 2, 0.0, is_any_order=True)), 1_000),
    "2x1, in any order, a cancel": (SmallWorld(2, Limits((1, 1), 2, is_any_order=True), num_cancels=1), 4_000),
    "2x4, answers outgrow decode": (growing(2), 1_000),
    "2x4, answers outgrow decode, which crashes": (growing(2, num_crashes=(0, 1)), 7_000),
    "2x4, answers outgrow decode, a cancel": (growing(2, num_cancels=1), 14_000),
    "one of two parts, decode crashes, a cancel": (parts(1, num_crashes=(0, 1), num_cancels=1), 5_000),
    "two of two parts, a cancel": (parts(2, num_cancels=1), 3_000),
    "two of two parts, prefill crashes": (parts(2, num_crashes=(1, 0)), 2_000),
}
"""requests x blocks on either side, what may go wrong; and how many states there are at least."""


@pytest.mark.parametrize("name", WORLDS)
def test_no_order_of_events_leads_astray(name: str) -> None:
    world, num_states = WORLDS[name]
    assert explore(world, MAX_STATES) > num_states


def decode_frees_on_abort_and_lets_the_transfer_live(patch: Patch) -> None:
    patch.setattr(RemoteInbox, "drop", lambda self, attempt: None)


def decode_commits_before_everything_is_there(patch: Patch) -> None:
    original = DecodeRole._take_handoff

    def take_handoff(self: DecodeRole, reservation, handoff) -> None:
        reservation.incomplete.clear()
        original(self, reservation, handoff)

    patch.setattr(DecodeRole, "_take_handoff", take_handoff)


def nobody_looks_at_epochs(patch: Patch) -> None:
    def deliver(self: SmallWorld, side: int) -> None:
        _, message = self.down[side][0]
        self.down[side][0] = (self.lives[side].item.epoch, message)
        original(self, side)

    original = SmallWorld._deliver
    patch.setattr(SmallWorld, "_deliver", deliver)


def nobody_looks_at_attempts(patch: Patch) -> None:
    original = Life.land

    def land(self: Life, attempt, position: int, kv) -> None:
        waiting = [known for known, (_, missing) in self.expected.items() if position in missing]
        original(self, (waiting or [attempt])[0], position, kv)

    patch.setattr(Life, "land", land)


def the_outbox_limit_keeps_granted_prompts_out_too(patch: Patch) -> None:
    """sglang #31473: what decode has room for waits for a place among what it has no room for."""
    original = Admission._claim
    patch.setattr(Admission, "_claim", lambda self, job: original(self, job) if self._has_place(job) else None)


def granted_prompts_wait_for_ungranted_ones(patch: Patch) -> None:
    patch.setattr(Admission, "_claim", lambda self, job: self._try(job))


def a_first_token_is_sent_twice(patch: Patch) -> None:
    original = PrefillRole._give_up

    def _give_up(self: PrefillRole, job: Job) -> None:  # copies find it by its name
        original(self, job)
        job.first_token_id = None

    patch.setattr(PrefillRole, "_give_up", _give_up)


def kv_is_put_back_where_it_was(patch: Patch) -> None:
    original = Life.order
    places: dict = {}

    def order(self: Life, order) -> None:
        if isinstance(order, Park):
            places[order.attempt] = order.block_ids
        if isinstance(order, Unpark):
            order = msgspec.structs.replace(order, block_ids=(*places[order.attempt], *order.block_ids)[:3])
        original(self, order)

    patch.setattr(Life, "order", order)


def prefill_ignores_the_commit(patch: Patch) -> None:
    original = PrefillRole._drop
    patch.setattr(
        PrefillRole, "_drop", lambda self, attempt: None if self._jobs[attempt].grant else original(self, attempt)
    )


def prefill_sends_what_is_not_computed_yet(patch: Patch) -> None:
    original = Life._send
    patch.setattr(Life, "_send", lambda self, order, first, num_computed: original(self, order, first, 9))


def prefill_does_not_say_that_more_is_computed(patch: Patch) -> None:
    patch.setattr(RemoteOutbox, "send_more", lambda self, sequence: None)


ANY_ORDER = Limits((1, 1), 2, is_any_order=True)
FOREIGN = "KV that is not its own"

PLANTS = [
    (decode_frees_on_abort_and_lets_the_transfer_live, SmallWorld(2, SMALL, num_cancels=1), f"nobody|{FOREIGN}"),
    (decode_commits_before_everything_is_there, SmallWorld(2, SMALL), FOREIGN),
    (nobody_looks_at_epochs, SmallWorld(2, SMALL, num_crashes=(0, 1)), "held for nobody|deadlock"),
    (nobody_looks_at_attempts, SmallWorld(2, Limits((4, 4))), FOREIGN),
    (the_outbox_limit_keeps_granted_prompts_out_too, SmallWorld(2, ANY_ORDER), "deadlock"),
    (granted_prompts_wait_for_ungranted_ones, SmallWorld(2, ANY_ORDER), "deadlock"),
    (a_first_token_is_sent_twice, SmallWorld(2, ANY_ORDER), "token 0 where token 1 was due"),
    (nobody_is_parked, growing(2), "deadlock"),
    (a_sequence_is_parked_whose_chunk_is_on_its_way, growing(2), FOREIGN),
    (kv_is_put_back_where_it_was, growing(2), FOREIGN),
    (prefill_ignores_the_commit, SmallWorld(2, SMALL), "deadlock|held for nobody"),
    (prefill_sends_what_is_not_computed_yet, parts(1), FOREIGN),
    (prefill_does_not_say_that_more_is_computed, parts(1), "deadlock"),
]


@pytest.mark.parametrize(("plant", "world", "says"), PLANTS, ids=[plant.__name__ for plant, *_ in PLANTS])
def test_the_search_finds_it(plant: Callable[[Patch], None], world: SmallWorld, says: str, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(Violation, match=says):
        explore(world, MAX_STATES)
