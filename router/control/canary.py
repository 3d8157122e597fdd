"""Canaries: small requests of the router's own that show that answers get through every group. Pure state.

What clients are served shows the same, so a busy group gets none. Used by controller.py, which also tells clients who
ask whether the cluster is ready. A canary is tied to its pair: where it fails it is not tried again elsewhere.
"""

import random
from collections.abc import Mapping, Sequence

from protocol.identity import new_request_id
from protocol.layout import UNIT_TOKENS
from protocol.request import Request, SamplingParams
from router.control.policies import Pair, PairKey

DEADLINE_S = 30.0
LATELY = 4
"""How many periods may pass since something got through, before a pair counts as one that serves nobody."""

_PREFIX = "canary-"


def is_canary(request_id: str) -> bool:
    """Whether this is no client's request."""
    return request_id.startswith(_PREFIX)


class Canaries:
    """When which pair gets one. period_s: how long a pair may be idle before it gets one; 0: no pair ever does."""

    def __init__(self, period_s: float, vocab_size: int) -> None:
        self._period_s = period_s
        self._vocab_size = vocab_size
        self._sent_s: dict[PairKey, float] = {}

    def due(self, pairs: Sequence[Pair], proved_s: Mapping[PairKey, float], now_s: float) -> list[Pair]:
        """Return the pairs that get one now. proved_s: when something last got through them."""
        if not self._period_s:
            return []
        keys = {pair.key for pair in pairs}
        self._sent_s = {key: sent_s for key, sent_s in self._sent_s.items() if key in keys}
        due = [pair for pair in pairs if self._is_due(pair.key, proved_s, now_s)]
        self._sent_s.update((pair.key, now_s) for pair in due)
        return due

    def request(self) -> Request:
        """Return a canary: a block to hand over, a token of prefill's and one of decode's."""
        prompt = tuple(random.choices(range(self._vocab_size), k=UNIT_TOKENS + 1))  # noqa: S311
        sampling = SamplingParams(max_tokens=2, seed=0, temperature=0.0, ignore_eos=True)
        return Request(_PREFIX + new_request_id(), prompt, sampling)

    def why_unproved(self, pairs: Sequence[Pair], proved_s: Mapping[PairKey, float], now_s: float) -> str | None:
        """Return which pair nothing has got through lately, None when there is none."""
        if not self._period_s:
            return None
        for pair in pairs:
            since_s = proved_s.get(pair.key)
            if since_s is None or now_s - since_s > LATELY * self._period_s:
                when = "yet" if since_s is None else f"for {now_s - since_s:.0f} s"
                return f"nothing has got through {_name(pair)} {when}"
        return None

    def _is_due(self, key: PairKey, proved_s: Mapping[PairKey, float], now_s: float) -> bool:
        last_s = max(proved_s.get(key, -self._period_s), self._sent_s.get(key, -self._period_s))
        return now_s - last_s >= self._period_s or (key not in proved_s and key not in self._sent_s)


def _name(pair: Pair) -> str:
    if pair.prefill is pair.decode:
        return f"colocated group {pair.prefill.group}"
    return f"prefill group {pair.prefill.group} and decode group {pair.decode.group}"
