"""Everything that can happen in clusters of two or three requests, in every order: no foreign KV, no deadlock, no leak.

Breadth first, so that what goes wrong is told by the shortest way to it. tests/simulation/small_world.py says what is
production code here and what is abstracted.
"""

import gc
from collections.abc import Callable, Iterator

import pytest

from decode_worker.inbox import RemoteInbox
from decode_worker.role import DecodeRole
from prefill_worker.outbox import RemoteOutbox
from prefill_worker.role import PrefillRole
from protocol import identity
from tests.simulation.search import explore
from tests.simulation.small_world import LONG_REQUESTS, Life, SmallWorld, Violation

MAX_STATES = 60_000
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: Patch) -> Iterator[None]:
    monkeypatch.setattr(identity, "new_epoch", lambda: 0)
    gc.freeze()  # or every collection of the copies made here would look through all imported modules too
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("requests", "blocks", "block_size", "crashes", "cancels", "num_states"),
    [
        (2, 2, 1, (0, 0), 1, 4_000),
        (2, 2, 1, (1, 1), 0, 20_000),
        (3, 1, 2, (0, 1), 0, 8_000),
    ],
    ids=["2x2, a cancel", "2x2, both sides crash", "3x1, decode crashes"],
)
def test_no_order_of_events_leads_astray(
    requests: int, blocks: int, block_size: int, crashes: tuple[int, int], cancels: int, num_states: int
) -> None:
    assert explore(SmallWorld(requests, blocks, block_size, crashes, cancels), MAX_STATES) > num_states


@pytest.mark.parametrize(
    ("requests", "crashes", "cancels", "num_states"),
    [(1, (1, 1), 1, 4_000), (2, (0, 0), 1, 3_000), (2, (1, 0), 0, 2_000)],
    ids=["one, and anything goes wrong", "two, a cancel", "two, prefill crashes"],
)
def test_nor_when_prompts_leave_in_parts(
    requests: int, crashes: tuple[int, int], cancels: int, num_states: int
) -> None:
    assert explore(SmallWorld(requests, 3, 1, crashes, cancels, LONG_REQUESTS), MAX_STATES) > num_states


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
        self.down[side][0] = (self.lives[side].epoch, message)
        original(self, side)

    original = SmallWorld._deliver
    patch.setattr(SmallWorld, "_deliver", deliver)


def nobody_looks_at_attempts(patch: Patch) -> None:
    original = Life.land

    def land(self: Life, attempt, position: int, kv) -> None:
        waiting = [known for known, (_, missing) in self.expected.items() if position in missing]
        original(self, (waiting or [attempt])[0], position, kv)

    patch.setattr(Life, "land", land)


def decode_takes_the_newest_first(patch: Patch) -> None:
    def admit(self: DecodeRole) -> None:
        while self._waiting and self._start(self._waiting[-1]):
            self._grant_when_ready(self._waiting.pop())

    patch.setattr(DecodeRole, "_admit", admit)


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


PLANTS = [
    (decode_frees_on_abort_and_lets_the_transfer_live, (2, 2, 1, (0, 0), 1), "held for nobody|KV that is not its own"),
    (decode_commits_before_everything_is_there, (2, 2, 1, (0, 0), 0), "KV that is not its own"),
    (nobody_looks_at_epochs, (2, 2, 1, (0, 1), 0), "held for nobody|deadlock"),
    (nobody_looks_at_attempts, (2, 4, 1, (0, 0), 0), "KV that is not its own"),
    (decode_takes_the_newest_first, (3, 1, 2, (0, 0), 0), "deadlock"),
    (prefill_ignores_the_commit, (2, 2, 1, (0, 0), 0), "deadlock|held for nobody"),
    (prefill_sends_what_is_not_computed_yet, (1, 3, 1, (0, 0), 0, LONG_REQUESTS), "KV that is not its own"),
    (prefill_does_not_say_that_more_is_computed, (1, 3, 1, (0, 0), 0, LONG_REQUESTS), "deadlock"),
]


@pytest.mark.parametrize(("plant", "sizes", "says"), PLANTS, ids=[plant.__name__ for plant, *_ in PLANTS])
def test_the_search_finds_it(plant: Callable[[Patch], None], sizes: tuple, says: str, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(Violation, match=says):
        explore(SmallWorld(*sizes), MAX_STATES)
