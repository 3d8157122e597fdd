"""A signal that asks one worker to end: it says so to the router first, so that no stream need be cut.

SIGTERM is what a person sends who takes a worker away, and Ray when a machine is drained; Ray kills what is left some
seconds later. The actor listens, the loops ask.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from protocol.errors import TandemError
from protocol.messages import Departing
from worker.control_link import ControlLink

WITHIN_S = 2.0
"""What the router has for moving the streams; it says sooner that nothing more will come, if it can."""


class Departed(TandemError):
    """A signal has asked this process to end, and the router has had its time."""


class Departure:
    """One process's wish to leave. Where nobody listens for signals nobody ever asks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_serving = False
        self._is_asked = False
        self._ends_at: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM, in the main thread; Ray's own handler would raise wherever the loop is."""
        before = signal.signal(signal.SIGTERM, self.ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def ask(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ask this process to end. Where it does not serve yet, or is asked again, it does so at once."""
        if self._is_asked or not self._is_serving:
            os._exit(1)
        self._is_asked = True

    def turn(self, link: ControlLink) -> None:
        """Called in every turn of a loop that serves. Raise Departed when the router has had its time."""
        self._is_serving = True
        if not self._is_asked:
            return
        if self._ends_at is None:
            self._ends_at = self._clock() + WITHIN_S
            link.send(Departing())
            link.flush()
        elif self._clock() >= self._ends_at:
            raise Departed("a signal asked this process to end")
