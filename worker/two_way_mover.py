"""A mover for ranks whose KV goes both ways: handoffs one way, what prefill fetches from decode the other.

Put together by assembly.py out of the two roles' movers. Both ways of one attempt bear its name, so what breaks
on the way of a fetch is reported as FetchBroken: the attempt itself may go on.
"""

from collections.abc import Iterator, Sequence

from engine.group import sums
from engine.rank import Mover
from protocol.orders import AnyOrder, AnyReport, Broken, FetchBroken, Leaving


class TwoWayMover:
    """See engine.rank.Mover. One of the two sends and the other receives; each passes over the other's orders."""

    def __init__(self, handoffs: Mover, fetches: Mover) -> None:
        self._handoffs = handoffs
        self._fetches = fetches

    @property
    def address(self) -> str:
        return self._handoffs.address or self._fetches.address

    def execute(self, order: AnyOrder) -> None:
        self._handoffs.execute(order)
        self._fetches.execute(order)

    def layers_done(self, leaving: Sequence[Leaving], num_layers: int) -> None:
        self._handoffs.layers_done(leaving, num_layers)

    def poll(self) -> list[AnyReport]:
        return [*self._handoffs.poll(), *self._of_fetches()]

    def filenos(self) -> list[int]:
        return [*self._handoffs.filenos(), *self._fetches.filenos()]

    def counters(self) -> dict[str, int]:
        return sums([self._handoffs.counters(), self._fetches.counters()])

    def close(self) -> None:
        self._handoffs.close()
        self._fetches.close()

    def _of_fetches(self) -> Iterator[AnyReport]:
        for report in self._fetches.poll():
            match report:
                case Broken(rank, attempt, reason):
                    yield FetchBroken(rank, attempt, reason)
                case _:
                    yield report
