"""Whether a cluster that starts still gets anywhere: every wait for a worker to become ready has a deadline.

Called by the supervisor with every look at the router's status, until all ranks are ready. Deadlines are on silence:
loading may take as long as it likes while a worker goes on telling of it. Starts and ends nothing.
"""

import time
from collections.abc import Callable, Sequence

import msgspec

from cluster.status_client import ClusterStatus, WorkerStatus
from protocol.errors import TandemError
from protocol.messages import RoleName
from worker.control_link import WELCOME_TIMEOUT_S
from worker.launch import WorkerLaunch

JOIN_WITHIN_S = 3 * WELCOME_TIMEOUT_S
"""Shorter than MAX_LIVES lives of followers whose leader never joins: the leader is to be named, not they."""
BACK_WITHIN_S = 900.0
"""A rank that is loading when its group is lost hears of it only when it has loaded; then its next life begins."""
SILENT_FOR_S = 3600.0
"""A worker says little while it compiles, and nothing new while another one of its machine fetches the same files."""
NO_STATUS_FOR_S = 60.0
MAX_LIVES = 3

RankKey = tuple[RoleName, int, int]


class _Heard(msgspec.Struct):
    """What one rank said last (None: it never joined), since when, and how many lives it has had."""

    news: tuple[str, ...] | None
    since_s: float
    epoch: str = ""
    num_lives: int = 0


class StartWatch:
    """Watches the ranks that were launched. logs: where their output is, for the messages."""

    def __init__(
        self, launches: Sequence[WorkerLaunch], logs: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._launches = {(launch.role, launch.group, launch.rank): launch for launch in launches}
        self._logs = logs
        self._clock = clock
        self._answered_s = clock()
        self._heard: dict[RankKey, _Heard] = {place: _Heard(None, self._answered_s) for place in self._launches}

    def look(self, status: ClusterStatus | None) -> None:
        """Take the router's status, None when it did not answer. Raise TandemError when the start leads nowhere."""
        now_s = self._clock()
        if status is None:
            if now_s - self._answered_s > NO_STATUS_FOR_S:
                raise TandemError(f"the router runs, but has not answered GET /status for {NO_STATUS_FOR_S:g} s")
            return
        self._answered_s = now_s
        here = {(worker.role, worker.group, worker.rank): worker for worker in status.workers}
        for place in self._launches:
            self._look_at(place, here.get(place), now_s)

    def _look_at(self, place: RankKey, worker: WorkerStatus | None, now_s: float) -> None:
        heard = self._heard[place]
        if worker is not None:
            self._note(heard, worker, now_s)
        silent_s = now_s - heard.since_s
        if worker is None or worker.state == "dead":
            limit_s = JOIN_WITHIN_S if worker is None else BACK_WITHIN_S
            if silent_s > limit_s:
                raise TandemError(self._unreached(self._launches[place], limit_s))
        elif worker.state == "starting" and silent_s > SILENT_FOR_S:
            raise TandemError(
                f"{worker.name} has said nothing new for {SILENT_FOR_S / 60:g} minutes; the last was "
                f'"{worker.doing}"; see {self._logs} on {worker.node}, process {worker.pid}'
            )

    def _note(self, heard: _Heard, worker: WorkerStatus, now_s: float) -> None:
        news = (worker.epoch, worker.state, worker.doing)
        if heard.news != news:
            heard.news, heard.since_s = news, now_s
        if heard.epoch != worker.epoch:
            heard.epoch = worker.epoch
            heard.num_lives += 1
        if heard.num_lives > MAX_LIVES:
            raise TandemError(f"{worker.name} died {MAX_LIVES} times while starting; see {self._logs}")

    def _unreached(self, launch: WorkerLaunch, limit_s: float) -> str:
        return (
            f"{launch.name} has not reached the router at {launch.control} for {limit_s:g} s. Check that the "
            f"machine where Ray runs it can connect to that address and to any port there (routes, firewalls), and "
            f"what the worker said: {self._logs}, on that machine"
        )
