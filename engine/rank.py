"""One rank of a group: carries out the leader's orders, the same ones in the same sequence as every other rank.

A step runs on the engine, and KV that makes way goes to the host and back; everything else concerns KV on its way to or
from other groups and goes to the rank's mover, which is the part that a role adds to all ranks of its group.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from engine.engine import Engine
from engine.out_of_memory import naming_lack_of_memory
from engine.parked_kv import ParkedKV
from protocol.orders import AnyOrder, AnyReport, Batch, Discard, Leaving, Park, Step, Unpark


class Mover(Protocol):
    """What moves this rank's KV blocks to or from other groups."""

    @property
    def address(self) -> str:
        """Where peers send frames to this rank; "" when none are taken."""

    def execute(self, order: AnyOrder) -> None:
        """Carry out an order about a transfer."""

    def layers_done(self, leaving: SequenceOf[Leaving], num_layers: int) -> None:
        """In the middle of a batch: KV of its leaving attempts is there in the first num_layers layers."""

    def poll(self) -> list[AnyReport]:
        """Do what has become possible, without waiting; return what the leader should know."""

    def filenos(self) -> list[int]:
        """Descriptors that become readable when poll has something to do."""

    def counters(self) -> dict[str, int]:
        """How often something had to be dropped or refused, by reason."""

    def close(self) -> None:
        """Let go of sockets and threads."""


class Stationary:
    """The mover of a group whose KV never leaves it (both roles on one engine)."""

    address = ""

    def execute(self, order: AnyOrder) -> None:
        """Nothing moves."""

    def layers_done(self, leaving: SequenceOf[Leaving], num_layers: int) -> None:
        """Nothing moves."""

    def poll(self) -> list[AnyReport]:
        return []

    def filenos(self) -> list[int]:
        return []

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


class Rank:
    """An engine, what is parked of its KV, and a mover, under orders."""

    def __init__(
        self, engine: Engine, parked_kv: ParkedKV, mover: Mover, pulse: Callable[[], None] = lambda: None
    ) -> None:
        """pulse is called after every layer of a step, and after the step: it shows that a long one goes on."""
        self._engine = engine
        self._parked_kv = parked_kv
        self._pulse = pulse
        self.mover = mover

    def forward(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor | None:
        """Run a batch; return logits [num_sampled, vocab_size] on the leader's rank, None on the others.

        drawn: on the leader's rank, int64 [rows of the batch before], what that draws.
        Raise OutOfMemoryError when there is no memory for it, on whatever device.
        """

        def layers_done(num_layers: int) -> None:
            self._pulse()
            if batch.leaving:
                self.mover.layers_done(batch.leaving, num_layers)

        with naming_lack_of_memory():
            logits = self._engine.forward(batch, drawn, layers_done)
        self._pulse()
        return logits

    def execute(self, order: AnyOrder) -> None:
        """Carry out any order but StopRank."""
        match order:
            case Step():
                self.forward(order.batch)
            case Park() | Unpark() | Discard():
                self._parked_kv.execute(order)
            case _:
                self.mover.execute(order)
