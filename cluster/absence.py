"""What a person can do about workers that stay away: Ray brings back a worker, but never the machine that it ran on.

Asked by the supervisor with every look at the router's status while it serves. Starts and ends nothing.
"""

import time
from collections.abc import Callable, Sequence

from cluster.status_client import WorkerStatus

AWAY_FOR_S = 30.0
"""The next life of a worker that was killed has joined by then."""
GIVEN_UP_AFTER_S = 90.0
"""Ray has given up a machine by then that does not answer (after 64 s, measured)."""


class Absence:
    """Notes since when workers are lost. lost_machines: those that Ray has given up, by address."""

    def __init__(self, lost_machines: Callable[[], list[str]], clock: Callable[[], float] = time.monotonic) -> None:
        self._lost_machines = lost_machines
        self._clock = clock
        self._since_s: dict[str, float] = {}  # by epoch

    def complaint(self, workers: Sequence[WorkerStatus]) -> str | None:
        """Return a sentence about those that stay away, once for each life, when there is something to say of them."""
        now_s = self._clock()
        lost = [worker for worker in workers if worker.state == "dead"]
        self._since_s = {worker.epoch: self._since_s.get(worker.epoch, now_s) for worker in lost}
        overdue = [worker for worker in lost if now_s - self._since_s[worker.epoch] > AWAY_FOR_S]
        machines = self._lost_machines() if overdue else []
        patience_s = AWAY_FOR_S if machines else GIVEN_UP_AFTER_S
        away = [worker for worker in overdue if now_s - self._since_s[worker.epoch] > patience_s]
        for worker in away:
            self._since_s[worker.epoch] = float("inf")
        return _sentence(away, machines) if away else None


def _sentence(away: Sequence[WorkerStatus], machines: Sequence[str]) -> str:
    names = ", ".join(worker.name for worker in away)
    what = (
        f"Ray has lost {', '.join(machines)}: start Ray there again, or on another machine"
        if machines
        else "`ray status` says what Ray has no place for"
    )
    return f"not back: {names}. {what}; they start as soon as there is a place for them"
