"""The transport of a colocated group: nothing moves, a reference to the reserved blocks is handed over.

The decode role offers what it has reserved, the prefill role of the same worker adopts it and computes into it.
"""

from typing import Generic, TypeVar

from protocol.identity import Attempt

HoldT = TypeVar("HoldT")


class Loopback(Generic[HoldT]):
    """One per colocated worker, used by its main thread only."""

    def __init__(self) -> None:
        self._offers: dict[Attempt, HoldT] = {}

    def offer(self, attempt: Attempt, hold: HoldT) -> None:
        """Decode side: these are the blocks for this attempt."""
        assert attempt not in self._offers, "an attempt is offered once"
        self._offers[attempt] = hold

    def adopt(self, attempt: Attempt) -> HoldT | None:
        """Prefill side: take over what was offered; None when there is nothing (yet, or any more)."""
        return self._offers.pop(attempt, None)

    def drop(self, attempt: Attempt) -> None:
        """Either side: forget an offer that nobody adopted; unknown attempts are fine."""
        self._offers.pop(attempt, None)
