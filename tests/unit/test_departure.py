"""A worker that a signal asks to end: what it tells the router, and when it is gone."""

import subprocess
import sys
from pathlib import Path

import pytest

from protocol.messages import AnyMessage, Departing
from tests.simulation.clock import Clock
from worker.departure import WITHIN_S, Departed, Departure

ROOT = Path(__file__).parents[2]


class Link:
    """A ControlLink that keeps what was sent."""

    def __init__(self) -> None:
        self.queued: list[AnyMessage] = []
        self.sent: list[AnyMessage] = []

    def send(self, message: AnyMessage) -> None:
        self.queued.append(message)

    def flush(self) -> None:
        self.sent += self.queued
        self.queued = []


def test_it_says_so_once_and_goes_on_for_as_long_as_the_router_may_need():
    clock, link = Clock(), Link()
    departure = Departure(clock.read)
    departure.turn(link)  # type: ignore[arg-type]
    assert link.sent == []
    departure.ask()
    for _ in range(10):
        departure.turn(link)  # type: ignore[arg-type]
        clock.now_s += WITHIN_S / 10.5
    assert link.sent == [Departing()]
    clock.now_s += WITHIN_S / 10.5
    with pytest.raises(Departed):
        departure.turn(link)  # type: ignore[arg-type]


NOT_SERVING = """
import os, signal, time
from worker.departure import Departure
with Departure().listening():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_worker_that_does_not_serve_yet_ends_at_once():
    assert subprocess.run([sys.executable, "-c", NOT_SERVING], cwd=ROOT, timeout=30, check=False).returncode == 1
