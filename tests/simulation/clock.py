"""Virtual time: what is due next happens next; equal times in the order of planning. Nothing ever waits."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """Time starts at 0 and moves only when something is due."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Action]] = []
        self._num_planned = 0

    def read(self) -> float:
        """Return the time, as time.monotonic does."""
        return self.now_s

    def after(self, delay_s: float, action: Action) -> None:
        """Do action in delay_s."""
        self._num_planned += 1
        heapq.heappush(self._due, (self.now_s + delay_s, self._num_planned, action))

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Let things happen until condition holds, and return True; False when limit_s more seconds went by."""
        end_s = self.now_s + limit_s
        while not condition():
            if not self._due or self._due[0][0] > end_s:
                self.now_s = end_s
                return False
            self.now_s, _, action = heapq.heappop(self._due)
            action()
        return True
