"""What everything in one simulation shares: the clock, the dice, the KV network, the wires, and the story so far."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.messages import WorkerInfo
from router.control.membership import identity_of
from tests.simulation.clock import Clock
from tests.simulation.control import SimulatedWire
from tests.simulation.kv import KVFaults, KVNetwork


@dataclass
class World:
    """rng decides everything that is left to chance, so one seed is one story."""

    rng: random.Random
    faults: KVFaults = field(default_factory=KVFaults)
    is_told: bool = False

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.kv = KVNetwork(self.clock, self.rng, self.faults)
        self.wires: dict[bytes, SimulatedWire] = {}
        self.hear: Callable[[bytes, bytes], None] = lambda identity, data: None

    def connect(self, info: WorkerInfo, wake: Callable[[], None]) -> SimulatedWire:
        """Return a fresh wire for this life of a rank."""
        identity = identity_of(info)
        wire = SimulatedWire(self.clock, self.rng, identity, self.hear, wake)
        self.wires[identity] = wire
        return wire

    def tell(self, story: Callable[[], str]) -> None:
        """Print one line of the story, when somebody wants to hear it."""
        if self.is_told:
            print(f"{self.clock.now_s:9.4f}  {story()}")
