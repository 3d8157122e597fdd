"""A worker that stays away because its machine is gone is told of, with what to do; one that comes back is not."""

import pytest

from cluster.absence import AWAY_FOR_S, GIVEN_UP_AFTER_S, Absence
from cluster.status_client import WorkerStatus
from protocol.messages import RoleName, WorkerState
from tests.simulation.clock import Clock


def worker(role: RoleName, state: WorkerState = "dead", epoch: str = "a") -> WorkerStatus:
    return WorkerStatus(role=role, group=0, rank=0, pid=7, node="far", state=state, epoch=f"{role} {epoch}")


class Watched:
    """What is said while workers are looked at, four times a second, for as long as one says."""

    def __init__(self, lost_machines: list[str]) -> None:
        self._clock = Clock()
        self._absence = Absence(lambda: lost_machines, self._clock.read)

    def for_s(self, seconds: float, *workers: WorkerStatus) -> list[str]:
        said = []
        for _ in range(int(seconds * 4)):
            self._clock.now_s += 0.25
            said.append(self._absence.complaint(workers))
        return [sentence for sentence in said if sentence]


@pytest.mark.parametrize(
    ("machines", "silent_s", "remedy"),
    [(["10.0.0.7"], AWAY_FOR_S, "lost 10.0.0.7: start Ray there"), ([], GIVEN_UP_AFTER_S, "ray status")],
)
def test_whoever_stays_away_is_told_of_once_with_what_to_do(machines: list[str], silent_s: float, remedy: str):
    watched = Watched(machines)
    healthy = worker("prefill", "ready")
    assert watched.for_s(silent_s - 1, healthy, worker("decode")) == []
    [said] = watched.for_s(100 * AWAY_FOR_S, healthy, worker("decode"))
    assert "decode 0" in said
    assert "prefill" not in said
    assert remedy in said


def test_a_machine_that_ray_gives_up_late_is_named_all_the_same():
    machines: list[str] = []
    watched = Watched(machines)
    assert watched.for_s(2 * AWAY_FOR_S, worker("decode")) == []
    machines.append("10.0.0.7")
    [said] = watched.for_s(100 * AWAY_FOR_S, worker("decode"))
    assert "10.0.0.7" in said


def test_workers_of_one_machine_are_told_of_together():
    [said] = Watched(["10.0.0.7"]).for_s(2 * AWAY_FOR_S, worker("prefill"), worker("decode"))
    assert "prefill 0, decode 0" in said


def test_whoever_is_back_in_time_is_not_told_of_and_may_be_lost_again():
    watched = Watched(["10.0.0.7"])
    for life in range(5):
        assert watched.for_s(AWAY_FOR_S - 1, worker("decode", epoch=str(life))) == []
        assert watched.for_s(5, worker("decode", "starting", epoch=str(life + 1))) == []
    assert len(watched.for_s(2 * AWAY_FOR_S, worker("decode", epoch="last"))) == 1
