"""Ten thousand simulated clusters, each with its own faults: right tokens or clear errors, and nothing left behind."""

import pytest

from protocol.messages import AnyMessage, Fetch, Prefill, Reserve
from tests.simulation.scenario import run_seed
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


def test_a_seed_always_tells_the_same_story(capsys: pytest.CaptureFixture[str]) -> None:
    stories = []
    for _ in range(2):
        run_seed(13, is_told=True)
        stories.append(capsys.readouterr().out)
    assert stories[0] == stories[1]
    assert "token" in stories[0]
