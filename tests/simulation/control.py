"""Wires between ranks and router, as ZMQ over TCP gives them: in order, nothing twice; but they can be cut.

A cut wire is cut for good. What was under way may arrive up to some point and is lost from there on; the router finds
out when it sends (at once after a death, after some silence when only the network broke), the rank when it sends.
"""

import random
from collections import deque
from collections.abc import Callable

from cluster.control_link import Fenced
from tests.simulation.clock import Clock

MAX_LATENCY_S = 0.004


class Channel:
    """One direction of a wire."""

    def __init__(self, clock: Clock, rng: random.Random, take: Callable[[bytes], None]) -> None:
        self._clock = clock
        self._rng = rng
        self._take = take
        self._in_flight: deque[bytes] = deque()
        self._last_due_s = 0.0
        self.is_cut = False
        self.sent: deque[bytes] = deque(maxlen=8)

    def send(self, data: bytes) -> None:
        """Deliver later, after everything that was sent before; a cut channel loses it."""
        self.sent.append(data)
        if self.is_cut:
            return
        self._in_flight.append(data)
        due_s = max(self._last_due_s, self._clock.now_s + self._rng.random() * MAX_LATENCY_S)
        self._last_due_s = due_s
        self._clock.after(due_s - self._clock.now_s, self._arrive)

    def cut(self) -> None:
        """Lose everything from some point on."""
        self.is_cut = True
        num_arriving = self._rng.randint(0, len(self._in_flight))
        while len(self._in_flight) > num_arriving:
            self._in_flight.pop()

    def _arrive(self) -> None:
        if self._in_flight:
            self._take(self._in_flight.popleft())


class SimulatedWire:
    """One rank's wire (cluster.control_link.Wire), and the router's end of it."""

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        identity: bytes,
        hear: Callable[[bytes, bytes], None],
        wake: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._wake = wake
        self.identity = identity
        self.inbox: deque[bytes] = deque()
        self.up = Channel(clock, rng, lambda data: hear(identity, data))
        self.down = Channel(clock, rng, self.take)
        self._noticed_at_s = float("inf")

    @property
    def is_cut(self) -> bool:
        return self.up.is_cut

    @property
    def is_unreachable(self) -> bool:
        """Whether the router's socket knows by now that nobody is there."""
        return self._clock.now_s >= self._noticed_at_s

    @property
    def recent(self) -> list[bytes]:
        """What the router sent last, arrived or not."""
        return list(self.down.sent)

    def cut(self, noticed_after_s: float = 0.0) -> None:
        """Cut both ways."""
        if self.is_cut:
            return
        self._noticed_at_s = self._clock.now_s + noticed_after_s
        self.up.cut()
        self.down.cut()

    # --- cluster.control_link.Wire ------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        if self.up.is_cut:
            raise Fenced("the connection to the router is gone")
        self.up.send(data)

    def receive(self) -> bytes | None:
        return self.inbox.popleft() if self.inbox else None

    def wait(self, timeout_s: float) -> None:
        raise AssertionError("nothing waits in a simulation")

    def take(self, data: bytes) -> None:
        """Something has arrived."""
        self.inbox.append(data)
        self._wake()
