"""Wires between ranks and router, as ZMQ over TCP gives them: in order, nothing twice; but they can be cut.

What was under way when a wire is cut may arrive up to some point and is lost from there on. The router finds out when
it sends: at once after a death, after some silence when only the network broke. A rank that lives connects again, but
not before the router has found out; what it says meanwhile is kept.
"""

import random
from collections import deque
from collections.abc import Callable

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
    """One rank's wire (worker.control_link.ControlWire), and the router's end of it."""

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        identity: bytes,
        hear: Callable[[bytes, bytes], None],
        wake: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._hear = hear
        self._wake = wake
        self.identity = identity
        self.inbox: deque[bytes] = deque()
        self._unsent: list[bytes] = []
        self._is_ended = False
        self._connect()

    def _connect(self) -> None:
        self.up = Channel(self._clock, self._rng, lambda data: self._hear(self.identity, data))
        self.down = Channel(self._clock, self._rng, self.take)
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

    def cut(self, noticed_after_s: float = 0.0, back_after_s: float | None = None) -> None:
        """Cut both ways, for good or for some time."""
        if self.is_cut:
            return
        self._noticed_at_s = self._clock.now_s + noticed_after_s
        self.up.cut()
        self.down.cut()
        if back_after_s is not None:
            self._clock.after(back_after_s, self._come_back)

    def end(self) -> None:
        """The process is gone, and its socket with it."""
        self.cut()
        self._noticed_at_s = min(self._noticed_at_s, self._clock.now_s)
        self._is_ended = True

    def _come_back(self) -> None:
        if self._is_ended:
            return
        self._connect()
        for data in self._unsent:
            self.up.send(data)
        self._unsent.clear()

    # --- worker.control_link.ControlWire ------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        if self.is_cut:
            self._unsent.append(data)
        else:
            self.up.send(data)

    def receive(self) -> bytes | None:
        return self.inbox.popleft() if self.inbox else None

    def wait(self, timeout_s: float) -> None:
        raise AssertionError("nothing waits in a simulation")

    def take(self, data: bytes) -> None:
        """Something has arrived."""
        self.inbox.append(data)
        self._wake()
