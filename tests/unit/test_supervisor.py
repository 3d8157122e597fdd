"""What the driver does about workers that end while it serves, with Ray and the router played by hand."""

import io
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import placement
from cluster import supervisor as module
from cluster.commands import up
from cluster.progress import ProgressDisplay
from cluster.restarts import MAX_DELAY_S, SERVED_FOR_S
from cluster.status_client import ClusterStatus, WorkerStatus
from cluster.supervisor import RayLost, Supervisor
from protocol.errors import TandemError
from protocol.topology import ModelSection, RouterSection
from tests.simulation.clock import Clock


class Run:
    """The future of a run: told from others by being another."""


@dataclass(eq=False)
class FakeRank:
    """A rank whose runs end when ends_in_s is up (None: never)."""

    clock: Clock
    name: str
    ends_in_s: float | None = None
    num_kills: int = 0
    pid: int = 7

    def __post_init__(self) -> None:
        role, group, rank = self.name.split("-")
        self.launch = SimpleNamespace(role=role, group=int(group), rank=int(rank[4:]), name=self.name)
        self.runs_s: list[float] = []
        self.run_again()

    def run_again(self) -> None:
        self.runs_s.append(self.clock.now_s)
        self.running = Run()

    def is_process(self, pid: int) -> bool:
        return pid == self.pid

    def kill(self) -> None:
        self.num_kills += 1

    def end(self) -> None:
        self.num_kills += 1

    @property
    def has_ended(self) -> bool:
        return self.ends_in_s is not None and self.clock.now_s - self.runs_s[-1] >= self.ends_in_s


class FakeRouter:
    """Runs, and ends when told to."""

    exit_code = None
    addresses = SimpleNamespace(http="http://x", control="tcp://x")

    def drain(self, patience_s: float) -> None: ...

    def end(self) -> None: ...


class Cluster:
    """A supervisor of two ranks that serve. Looking takes the time that it says to Ray, of a clock of its own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.ranks = [FakeRank(self.clock, "prefill-0-rank0"), FakeRank(self.clock, "decode-0-rank0")]
        self.workers = tuple(worker_of(rank) for rank in self.ranks)
        self._stop_s = 0.0
        self.num_answers: int | None = None
        self.lost_part: str | None = None
        patch.setattr(module, "ray", SimpleNamespace(wait=self._wait, exceptions=SimpleNamespace(RayError=OSError)))
        patch.setattr(module, "time", SimpleNamespace(sleep=self._sleep))
        patch.setattr(module, "fetch_status", self._fetch_status)
        patch.setattr(module, "_complaint", lambda running: "oh")
        patch.setattr(module, "lost_machines", lambda: ["10.0.0.7"])
        self.is_given_up = False
        patch.setattr(module, "_is_given_up", lambda running: self.is_given_up, raising=False)
        router: Any = FakeRouter()
        ranks: Any = self.ranks
        self.said = io.StringIO()
        self.supervisor = Supervisor(
            router, ranks, ProgressDisplay(2, self.said), "/logs", lambda: self.lost_part, self.clock.read
        )
        assert self.supervisor.wait_until_ready(self)  # type: ignore[arg-type]

    @property
    def is_asked(self) -> bool:
        """What a StopSignal tells."""
        return self._stop_s and self.clock.now_s >= self._stop_s

    def stop_in(self, seconds: float) -> None:
        self._stop_s = self.clock.now_s + seconds

    def serve(self, for_s: float) -> None:
        self.stop_in(for_s)
        self.supervisor.watch(self)  # type: ignore[arg-type]

    def _fetch_status(self, url: str) -> ClusterStatus:
        if self.num_answers is not None:
            self.num_answers -= 1
            if self.num_answers < 0:
                raise TandemError("busy")
        return ClusterStatus(self.workers)

    def _wait(self, running: list[Any], timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        ended = [rank.running for rank in self.ranks if rank.has_ended and rank.running in running][:1]
        self._sleep(0 if ended else timeout)
        return ended, [run for run in running if run not in ended]

    def _sleep(self, seconds: float) -> None:
        self.clock.now_s += max(seconds, 0.001)


def worker_of(rank: FakeRank, state: Any = "ready", epoch: str = "a") -> WorkerStatus:
    launch = rank.launch
    return WorkerStatus(launch.role, launch.group, launch.rank, rank.pid, node="elsewhere", state=state, epoch=epoch)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_a_worker_that_fails_again_and_again_is_run_again_with_pauses_that_grow_to_a_bound(cluster: Cluster):
    failing, healthy = cluster.ranks
    failing.ends_in_s = 0.5
    cluster.serve(300)
    pauses_s = [later - sooner - 0.5 for sooner, later in zip(failing.runs_s, failing.runs_s[1:], strict=False)]
    assert 1 <= pauses_s[0] < 2
    assert pauses_s[2] > 2 * pauses_s[0]
    assert MAX_DELAY_S <= pauses_s[-1] < MAX_DELAY_S + 1
    assert failing.num_kills >= len(pauses_s), "a run again in the process that the last one has left"
    assert len(healthy.runs_s) == 1


def test_a_worker_that_has_served_for_a_while_is_run_again_soon_whatever_it_did_before(cluster: Cluster):
    rank = cluster.ranks[0]
    rank.ends_in_s = 0.5
    cluster.serve(100)
    rank.ends_in_s = SERVED_FOR_S + 1
    cluster.serve(300)
    *_, sooner, later = rank.runs_s
    assert later - sooner - rank.ends_in_s < 2


def test_when_all_workers_have_failed_each_is_run_again(cluster: Cluster):
    for rank in cluster.ranks:
        rank.ends_in_s = 0.5
    cluster.serve(3)
    assert [len(rank.runs_s) for rank in cluster.ranks] == [2, 2]


def test_a_worker_that_ray_brings_back_no_more_ends_the_cluster(cluster: Cluster):
    cluster.ranks[1].ends_in_s, cluster.is_given_up = 5, True
    with pytest.raises(TandemError, match="decode-0-rank0 ended, and Ray brings it back no more: oh; shutting down"):
        cluster.serve(300)


def test_whoever_does_not_end_is_killed_once_and_lives_that_are_over_are_forgotten(cluster: Cluster):
    stuck = cluster.ranks[0]
    for life in range(50):
        cluster.workers = (worker_of(stuck, "dead", epoch=str(life)), worker_of(cluster.ranks[1]))
        cluster.serve(20)
        assert stuck.num_kills == life + 1
    assert len(cluster.supervisor._dead_since_s) == 1


def test_while_a_worker_has_no_machine_to_come_back_to_the_cluster_says_so_and_goes_on(cluster: Cluster):
    cluster.workers = (worker_of(cluster.ranks[0]), worker_of(cluster.ranks[1], "dead"))
    cluster.serve(300)
    assert cluster.said.getvalue().count("decode 0. Ray has lost 10.0.0.7: start Ray there again") == 1


@pytest.mark.parametrize("pid_now", [None, 8])
def test_whoever_has_ended_is_not_killed_once_more_while_the_next_life_takes_its_time(
    cluster: Cluster, pid_now: int | None
):
    """It was lost on another machine, where a process that has ended cannot be told from one that hangs by looking."""
    lost = cluster.ranks[0]
    cluster.workers = (worker_of(lost, "dead"), worker_of(cluster.ranks[1]))
    lost.pid = pid_now  # type: ignore[assignment]
    cluster.serve(100)
    assert lost.num_kills == 0


def test_a_machine_without_our_code_is_told_from_a_worker_that_died():
    missing = (
        "The actor died because of an error raised in its creation task, ray::WorkerActor.__init__() (pid=7, ip=far)\n"
        "RuntimeError: The actor with name WorkerActor failed to import on the worker.\n"
        "           ^^^^^^^^\nModuleNotFoundError: No module named 'cluster'\n"
    )
    assert module._in_short(missing).startswith(
        "ModuleNotFoundError: No module named 'cluster'. Its machine lacks code"
    )
    assert (
        module._in_short("The actor died unexpectedly.\n\tclass_name: WorkerActor\n") == "The actor died unexpectedly."
    )


def test_a_router_that_is_busy_right_after_the_start_does_not_end_the_cluster(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    """Every status but the first ready one goes unanswered."""
    monkeypatch.setattr(up, "_router_launch", lambda *_: None)
    monkeypatch.setattr(up, "RouterProcess", lambda launch: FakeRouter())
    monkeypatch.setattr(up, "longest_context", lambda *_: 64)
    monkeypatch.setattr(placement, "start_ranks", lambda *_: cluster.ranks)
    cluster.num_answers = 1
    cluster.stop_in(10)
    out = io.StringIO()
    topology: Any = SimpleNamespace(
        router=RouterSection(grace_s=1, sampling_defaults="none"), model=ModelSection(path="m")
    )
    session: Any = SimpleNamespace(host="h", is_local=True, logs="/logs", lost_part=lambda: None)
    up._serve(topology, None, session, ProgressDisplay(2, out), cluster)  # type: ignore[arg-type]
    assert "ready: http://x" in out.getvalue()
    assert out.getvalue().endswith("stopping\n")


def test_when_a_part_of_ray_is_lost_what_runs_may_finish_before_the_cluster_ends(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    drained_s: list[float] = []
    monkeypatch.setattr(up, "_router_launch", lambda *_: None)
    monkeypatch.setattr(up, "RouterProcess", lambda launch: FakeRouter())
    monkeypatch.setattr(FakeRouter, "drain", lambda self, patience_s: drained_s.append(patience_s))
    monkeypatch.setattr(up, "longest_context", lambda *_: 64)
    monkeypatch.setattr(placement, "start_ranks", lambda *_: cluster.ranks)
    topology: Any = SimpleNamespace(router=SimpleNamespace(grace_s=7), model=SimpleNamespace(name="m"))
    session: Any = SimpleNamespace(host="h", is_local=True, logs="/logs", lost_part=lambda: "head")
    out = io.StringIO()
    with pytest.raises(RayLost, match="Ray's head ended by itself"):
        up._serve(topology, None, session, ProgressDisplay(2, out), cluster)  # type: ignore[arg-type]
    assert drained_s
    assert drained_s[0] > 7
    assert "once what runs has finished" in out.getvalue()
