"""What a person can do about workers that stay away: Ray brings back a worker, but never the machine that it ran on.

Asked by the supervisor with every look at the router's status while it serves. Starts and ends nothing.
"""

import time
from collections.abc import Callable, Sequence

from cluster.status_client import WorkerStatus

AWAY_FOR_S = 30.0
"""The next life of a worker that was killed has joined by then, and Ray has given up a machine that does not answer."""


class Absence:
    """Notes since when workers are lost. lost_machines: those that Ray has given up, by address."""

    def __init__(self, lost_machines: Callable[[], list[str]], clock: Callable[[], float] = time.monotonic) -> None:
        self._lost_machines = lost_machines
        self._clock = clock
        self._since_s: dict[str, float] = {}  # by epoch

    def complaint(self, workers: Sequence[WorkerStatus]) -> str | None:
        """Return a sentence about those that have been lost for AWAY_FOR_S, once for each life; None without any."""
        now_s = self._clock()
        lost = [worker for worker in workers if worker.state == "dead"]
        self._since_s = {worker.epoch: self._since_s.get(worker.epoch, now_s) for worker in lost}
        away = [worker for worker in lost if now_s - self._since_s[worker.epoch] > AWAY_FOR_S]
        for worker in away:
            self._since_s[worker.epoch] = float("inf")
        return self._sentence(away) if away else None

    def _sentence(self, away: Sequence[WorkerStatus]) -> str:
        names = ", ".join(worker.name for worker in away)
        machines = ", ".join(self._lost_machines())
        what = (
            f"Ray has lost {machines}: start Ray there again, or on another machine of this cluster"
            if machines
            else "`ray status` says what Ray has no place for"
        )
        return f"not back for {AWAY_FOR_S:g} s: {names}. {what}; they start as soon as there is a place for them"
