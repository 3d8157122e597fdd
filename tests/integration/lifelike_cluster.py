"""ProcessCluster whose processes end as the Ray actor's do: when they hang, and when a signal asks them to.

SIGUSR1 lets a process hang: its main thread stands still, all others go on.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from protocol.errors import TandemError
from tests.integration.process_cluster import ProcessCluster
from worker.dead_man_switch import LEAST_S, DeadManSwitch, end_this_process
from worker.departure import Departure
from worker.launch import WorkerLaunch, decode, encode
from worker.life import run_worker

_context = multiprocessing.get_context("forkserver")


def live(encoded: bytes, least_s: float = LEAST_S) -> None:
    """Be a rank, in a process of its own. least_s: see DeadManSwitch."""
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1000))
    departure = Departure()
    try:
        with departure.listening():
            run_worker(decode(encoded), DeadManSwitch(end_this_process, least_s=least_s), departure)
    except TandemError:
        os._exit(1)


class LifelikeCluster(ProcessCluster):
    """See ProcessCluster. Processes go by their launch's name, "decode-0-rank1"."""

    def __init__(self, *arguments: Any, live: Callable[[bytes], None] = live, **options: Any) -> None:
        """live: what each process does."""
        super().__init__(*arguments, **options)
        self._live_there = live

    def send(self, name: str, number: signal.Signals) -> None:
        os.kill(self._processes[name].pid, number)

    def has_ended(self, name: str, within_s: float) -> bool:
        """Return whether this process ends by itself within so many seconds."""
        self._processes[name].join(within_s)
        return not self._processes[name].is_alive()

    def begin_next_lives(self) -> None:
        """Start again what has ended, as Ray would, and wait until all serve."""
        ended = [name for name, process in self._processes.items() if not process.is_alive()]
        launches = [self._launches[name] for name in ended]
        keys = {(launch.role, launch.group) for launch in launches}
        ranks = [rank for key in keys for rank in self.controller.membership.groups[key].ranks.values()]
        self.wait_until(lambda: not any(rank.is_alive for rank in ranks))
        for launch in launches:
            self._start_rank(launch)
        self.wait_until_ready()

    def _start_rank(self, launch: WorkerLaunch) -> None:
        process = _context.Process(target=self._live_there, args=(encode(launch),), daemon=True)
        process.start()
        self._launches[launch.name] = launch
        self._processes[launch.name] = process
