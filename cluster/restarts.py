"""When a worker whose run has ended while serving is run again: soon, but not over and over without a pause.

Told by the supervisor who ended, asked by it who is due. Knows names and times only, and starts nothing.
"""

import time
from collections.abc import Callable

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0
SERVED_FOR_S = 60.0
"""A worker that ran so long begins with the first delay again."""


class Restarts:
    """One delay per name, doubled with every run that was short."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s: dict[str, float] = {}
        self._delay_s: dict[str, float] = {}
        self._due_s: dict[str, float] = {}

    def has_ended(self, name: str) -> float:
        """Return in how many seconds this one is due."""
        now_s = self._clock()
        has_served = now_s - self._began_s.get(name, float("-inf")) >= SERVED_FOR_S
        delay_s = FIRST_DELAY_S if has_served else min(2 * self._delay_s[name], MAX_DELAY_S)
        self._delay_s[name] = delay_s
        self._due_s[name] = now_s + delay_s
        return delay_s

    def is_waiting(self, name: str) -> bool:
        """Whether this one has ended and was not run again yet."""
        return name in self._due_s

    def take_due(self) -> list[str]:
        """Return whose time has come; they count as run again from now on."""
        now_s = self._clock()
        due = [name for name, due_s in self._due_s.items() if due_s <= now_s]
        for name in due:
            del self._due_s[name]
            self._began_s[name] = now_s
        return due
