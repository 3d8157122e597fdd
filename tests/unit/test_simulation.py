"""Ten thousand simulated clusters, each with its own faults: right tokens or clear errors, and nothing left behind."""

import pytest

from protocol.messages import AnyMessage, Failed, Fetch, Prefill, Reserve
from tests.simulation import scenario
from tests.simulation.kv import KVFaults
from tests.simulation.scenario import Faults, run_seed
from worker.control_link import ControlLink

NUM_SEEDS = 10_000
SEEDS_PER_TEST = 500

ASKED = Reserve | Prefill | Fetch


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_whatever_happens_answers_are_right_and_pools_end_whole(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            run_seed(seed)
        except Exception as error:
            raise AssertionError(f"{error}\nreplay: python -m tests.simulation.scenario {seed}") from error


def test_what_workers_are_asked_twice_they_do_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request comes to them twice."""
    once = ControlLink.receive

    def twice(link: ControlLink) -> list[AnyMessage]:
        return [copy for message in once(link) for copy in [message] * (1 + isinstance(message, ASKED))]

    monkeypatch.setattr(ControlLink, "receive", twice)
    for seed in range(NUM_SEEDS, NUM_SEEDS + SEEDS_PER_TEST):
        run_seed(seed)


def test_frames_and_answers_that_are_lost_end_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sent again over a fresh connection, before anybody has to say that a transfer failed."""
    failed: list[Failed] = []
    send = ControlLink.send

    def note(link: ControlLink, message: AnyMessage) -> None:
        failed.extend([message] if isinstance(message, Failed) else [])
        send(link, message)

    monkeypatch.setattr(ControlLink, "send", note)
    losses = Faults("losses", KVFaults(drop=0.1, lose_answer=0.1))
    monkeypatch.setattr(scenario, "FAULTS", [losses])
    for seed in range(200):
        run_seed(seed)
        assert failed == [], seed


def test_a_seed_always_tells_the_same_story(capsys: pytest.CaptureFixture[str]) -> None:
    stories = []
    for _ in range(2):
        run_seed(13, is_told=True)
        stories.append(capsys.readouterr().out)
    assert stories[0] == stories[1]
    assert "token" in stories[0]
