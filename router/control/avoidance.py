"""Pairs of groups between which KV did not get through: left alone for a while, and tried again. Pure.

A group may be well and only the way between two of them cut, so it is pairs that are avoided. Kept by attempts.py.
"""

from collections.abc import Set as AbstractSet

from protocol.identity import Attempt, Epoch
from router.control.policies import PairKey

FIRST_S = 1.0
LONGEST_S = 30.0


class Avoidance:
    """Every failure in a row doubles the time; a transfer that succeeds ends it."""

    def __init__(self) -> None:
        self._until_s: dict[PairKey, float] = {}
        self._num_failures: dict[PairKey, int] = {}

    def failed(self, attempt: Attempt, now_s: float) -> None:
        """The transfer of this attempt has failed."""
        pair = attempt.epochs
        num = self._num_failures[pair] = self._num_failures.get(pair, 0) + 1
        self._until_s[pair] = now_s + min(LONGEST_S, FIRST_S * 2 ** (num - 1))

    def succeeded(self, attempt: Attempt) -> None:
        """The transfer of this attempt has arrived."""
        if self._num_failures and self._num_failures.pop(attempt.epochs, 0):
            self._until_s.pop(attempt.epochs, None)

    def lose(self, epoch: Epoch) -> None:
        """This group is gone."""
        for pair in [pair for pair in self._num_failures if epoch in pair]:
            del self._num_failures[pair]
            self._until_s.pop(pair, None)

    def pairs(self, now_s: float) -> AbstractSet[PairKey]:
        """Return the pairs to be avoided now."""
        for pair in [pair for pair, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[pair]
        return self._until_s.keys()
