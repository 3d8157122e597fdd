"""The best of many groups without a look at each of them. Used by dispatch.py.

A heap in which a group may stand several times: what is out of date is put right when it comes up. Pure.
"""

from collections.abc import Callable, Collection, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from protocol.identity import Epoch
from router.control.policies import ReadyGroup

SortKey = Callable[[ReadyGroup], tuple[float, ...]]


class Ranking:
    """groups, at least one, by cost: the least is best, and of equals the first.

    Every change of a cost must be told (moved); otherwise a group that got better is overlooked until it comes up.
    """

    def __init__(self, groups: Sequence[ReadyGroup], cost: SortKey) -> None:
        self.groups = tuple(groups)
        self._cost = cost
        self._places = {group.epoch: place for place, group in enumerate(self.groups)}
        self._heap: list[tuple[tuple[float, ...], int]] = []  # built when it is asked for the first time
        self.most_tokens = max(group.num_tokens for group in self.groups)

    def moved(self, epoch: Epoch) -> None:
        """This group's cost has changed; groups that are not here are fine."""
        place = self._places.get(epoch)
        if place is None or not self._heap:
            return
        heappush(self._heap, (self._cost(self.groups[place]), place))
        if len(self._heap) > 4 * len(self.groups) + 64:
            self._heap.clear()

    def find(self, epoch: Epoch | None, num_tokens: int) -> ReadyGroup | None:
        """Return the group of this epoch if it is here and can hold so many tokens."""
        place = self._places.get(epoch) if epoch else None
        group = None if place is None else self.groups[place]
        return group if group and group.num_tokens >= num_tokens else None

    def best(self, num_tokens: int, without: Collection[Epoch] = ()) -> ReadyGroup | None:
        """Return the best of those that can hold so many tokens, but for some; None when there is none."""
        if num_tokens > self.most_tokens:
            return None
        if not self._heap:
            self._heap = [(self._cost(group), place) for place, group in enumerate(self.groups)]
            heapify(self._heap)
        unfit = []
        while (group := self._first()) and (group.num_tokens < num_tokens or group.epoch in without):
            unfit.append(heappop(self._heap))
        for entry in unfit:
            heappush(self._heap, entry)
        return group

    def _first(self) -> ReadyGroup | None:
        while True:
            if not self._heap:
                return None
            cost, place = self._heap[0]
            cost_now = self._cost(self.groups[place])
            if cost == cost_now:
                return self.groups[place]
            heapreplace(self._heap, (cost_now, place))
