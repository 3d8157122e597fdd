"""The best of many groups without a look at each of them. Used by dispatch.py.

A heap in which a group may stand several times: what is out of date is put right when it comes up. Pure.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from protocol.identity import Epoch
from router.control.policies import ReadyGroup

Cost = Callable[[ReadyGroup], tuple[float, ...]]


class Ranking:
    """groups, at least one, by cost: the least is best, and of equals the first.

    Whoever changes a cost says so (moved), or a group that got better is overlooked until it comes up.
    """

    def __init__(self, groups: Sequence[ReadyGroup], cost: Cost) -> None:
        self._groups = tuple(groups)
        self._cost = cost
        self._places = {group.epoch: place for place, group in enumerate(self._groups)}
        self._heap: list[tuple[tuple[float, ...], int]] = []  # built when it is asked for the first time
        self.most_tokens = max(group.num_tokens for group in self._groups)

    def moved(self, epoch: Epoch) -> None:
        """This group's cost has changed; groups that are not here are fine."""
        place = self._places.get(epoch)
        if place is None or not self._heap:
            return
        heappush(self._heap, (self._cost(self._groups[place]), place))
        if len(self._heap) > 4 * len(self._groups) + 64:
            self._heap.clear()

    def best(self, num_tokens: int) -> ReadyGroup | None:
        """Return the best of those that can hold so many tokens; None when there is none."""
        if num_tokens > self.most_tokens:
            return None
        if not self._heap:
            self._heap = [(self._cost(group), place) for place, group in enumerate(self._groups)]
            heapify(self._heap)
        too_small = []
        while (group := self._first()).num_tokens < num_tokens:
            too_small.append(heappop(self._heap))
        for entry in too_small:
            heappush(self._heap, entry)
        return group

    def _first(self) -> ReadyGroup:
        while True:
            cost, place = self._heap[0]
            cost_now = self._cost(self._groups[place])
            if cost == cost_now:
                return self._groups[place]
            heapreplace(self._heap, (cost_now, place))
