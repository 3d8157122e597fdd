"""The driver's life after everything was started: watch until ready, then until the end, then take all of it down.

One loop, called by `up` in the main thread. It is never on a token's path: it looks a few times a second at the
router's process, the workers' runs and the router's status, and acts on what it sees.
"""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

import ray

from cluster.absence import Absence
from cluster.deadline import run_within
from cluster.placement import RankActor, lost_machines
from cluster.progress import ProgressDisplay
from cluster.restarts import Restarts
from cluster.router_process import RouterProcess
from cluster.start_watch import StartWatch
from cluster.status_client import ClusterStatus, WorkerStatus, fetch_status
from cluster.stop_signal import StopSignal
from protocol.errors import ConfigError, TandemError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Ray paints tracebacks
_LOOK_EVERY_S = 0.25
_DEAD_FOR_S = 1.0  # long enough for a worker that was fenced to hear of it; nothing of its life counts any more
_PATIENCE_S = 5.0  # beyond the router's own grace, for whatever is then still there


class Phase(Enum):
    """Starting ends when every rank has been ready at once; a rank lost later is Ray's to bring back."""

    STARTING = "starting"
    SERVING = "serving"


class RayLost(TandemError):
    """A part of Ray has ended, and the cluster must; the router and its workers may still be there."""


class Supervisor:
    """Watches one router and the ranks."""

    def __init__(
        self,
        router: RouterProcess,
        ranks: list[RankActor],
        progress: ProgressDisplay,
        logs: str,
        lost_part: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """lost_part: which part of Ray has ended by itself, if any."""
        self._router = router
        self._ranks = ranks
        self._lost_part = lost_part
        self._progress = progress
        self._logs = logs
        self._clock = clock
        self._phase = Phase.STARTING
        self._restarts = Restarts(clock)
        self._dead_since_s: dict[str, float] = {}
        self._absence = Absence(lost_machines, clock)

    def wait_until_ready(self, stop: StopSignal) -> ClusterStatus | None:
        """Return the first status with all ranks ready, None when asked to stop. Raise TandemError when none can be."""
        start = StartWatch([rank.launch for rank in self._ranks], self._logs, self._clock)
        while not stop.is_asked:
            self._look()
            status = self._show_status()
            if status is not None and self._is_all_ready(status):
                self._phase = Phase.SERVING
                return status
            start.look(status)
        return None

    def watch(self, stop: StopSignal) -> None:
        """Return when asked to stop; raise TandemError when the router ends by itself, RayLost when Ray does."""
        while not stop.is_asked:
            self._look()
            status = self._show_status()
            if status is not None:
                self._end_stuck(status)
                self._tell_who_stays_away(status)

    def drain(self, grace_s: float) -> None:
        """Let the router finish what runs and stop the workers; kill those that are still there afterwards."""
        self.drain_router(grace_s)
        ray.wait([rank.running for rank in self._ranks], num_returns=len(self._ranks), timeout=_PATIENCE_S)
        self.kill()

    def drain_router(self, grace_s: float) -> None:
        """Let what runs finish as far as workers are there for it. Asks nothing of Ray."""
        self._router.drain(grace_s + _PATIENCE_S)

    def kill(self) -> None:
        """End every rank, at once; where Ray does not answer, that is its own end's business (cluster/reaper.py)."""
        if self._lost_part() is None:
            run_within(_PATIENCE_S, self._end_all)

    def _end_all(self) -> None:
        for rank in self._ranks:
            with suppress(ray.exceptions.RayError):
                rank.end()

    def _look(self) -> None:
        """Wait a moment for runs to end, see to those that have, and run workers again whose pause is over."""
        ended = self._await_end()
        lost = self._lost_part()
        if lost is not None:
            raise RayLost(f"Ray's {lost} ended by itself, and without it no worker is ever brought back; shutting down")
        if self._router.exit_code is not None:
            raise TandemError(f"the router ended by itself (exit code {self._router.exit_code}); shutting down")
        for rank in self._ranks:
            if rank.running in ended:
                self._see_to(rank)
        due = self._restarts.take_due()
        for rank in self._ranks:
            if rank.name in due:
                rank.run_again()

    def _await_end(self) -> list[Any]:
        running = [rank.running for rank in self._ranks if not self._restarts.is_waiting(rank.name)]
        if not running:
            time.sleep(_LOOK_EVERY_S)
            return []
        return list(ray.wait(running, timeout=_LOOK_EVERY_S)[0])

    def _see_to(self, rank: RankActor) -> None:
        """A run that ended was not killed (then Ray would have run it again): it returned or raised."""
        complaint = _complaint(rank.running)
        if self._phase is Phase.STARTING:
            raise TandemError(f"{rank.name} did not start: {complaint}")
        if _is_given_up(rank.running):
            raise TandemError(f"{rank.name} ended, and Ray brings it back no more: {complaint}; shutting down")
        rank.kill()
        pause_s = self._restarts.has_ended(rank.name)
        self._progress.say(f"{rank.name} ended: {complaint}; starting it again in {pause_s:g} s")

    def _show_status(self) -> ClusterStatus | None:
        try:
            status = fetch_status(self._router.addresses.http)
        except TandemError:  # busy for a moment, or about to end, which _look will see
            return None
        self._progress.show(status)
        return status

    def _end_stuck(self, status: ClusterStatus) -> None:
        """Kill workers that the router has given up but that have not ended: stopped by a signal, or hung."""
        now_s = self._clock()
        dead = [worker for worker in status.workers if worker.state == "dead"]
        self._dead_since_s = {worker.epoch: self._dead_since_s.get(worker.epoch, now_s) for worker in dead}
        for worker in dead:
            if now_s - self._dead_since_s[worker.epoch] > _DEAD_FOR_S:
                self._dead_since_s[worker.epoch] = float("inf")
                self._end_if_there(self._rank_of(worker), worker)

    def _end_if_there(self, rank: RankActor, worker: WorkerStatus) -> None:
        if not self._restarts.is_waiting(rank.name) and rank.is_process(worker.pid):
            self._progress.say(f"{worker.name} does not end; killing it")
            rank.kill()

    def _tell_who_stays_away(self, status: ClusterStatus) -> None:
        complaint = self._absence.complaint(status.workers)
        if complaint is not None:
            self._progress.say(complaint)

    def _rank_of(self, worker: WorkerStatus) -> RankActor:
        who = (worker.role, worker.group, worker.rank)
        return next(rank for rank in self._ranks if (rank.launch.role, rank.launch.group, rank.launch.rank) == who)

    def _is_all_ready(self, status: ClusterStatus) -> bool:
        return sum(worker.state == "ready" for worker in status.workers) >= len(self._ranks)


def _is_given_up(running: Any) -> bool:
    """Whether the actor is dead for good, as all of ours are when the part of Ray that runs on this machine dies."""
    try:
        ray.get(running)
    except ray.exceptions.RayError as error:
        return isinstance(error, ray.exceptions.ActorDiedError)
    return False


def _complaint(running: Any) -> str:
    """Return why a run ended, in the worker's own words."""
    try:
        ray.get(running)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return str(cause) if isinstance(cause, ConfigError) else _COLOUR.sub("", str(error))
    except ray.exceptions.RayError as error:
        return _in_short(str(error))
    return "it returned before anyone told it to stop"


def _in_short(death: str) -> str:
    """Return what matters of Ray's words about a dead actor: the first line, or the last where its class is missing."""
    lines = death.strip().splitlines()
    first, last = lines[0], lines[-1]
    if "creation task" not in first:
        return first
    return f"{last}. Its machine lacks code: `ray job submit --working-dir .` ships ours, dependencies must be there"
