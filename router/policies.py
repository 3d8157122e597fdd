"""Which pair of groups gets the next request. Policies see pairs and the router's own counts, never stale heartbeats.

Used by router/dispatch.py. A prefix-aware policy is one more class here with the request's tokens as its hint.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from protocol.identity import Epoch
from protocol.layout import Endpoint
from protocol.topology import Policy as PolicyName


class ReadyGroup(msgspec.Struct, frozen=True):
    """A group that takes requests. num_tokens: what one request may hold in its pool at most."""

    group: int
    epoch: Epoch
    endpoint: Endpoint
    num_tokens: int


class Pair(msgspec.Struct, frozen=True):
    """A prefill and a decode group that can serve a request together; both are one group when it is colocated."""

    prefill: ReadyGroup
    decode: ReadyGroup

    def fits(self, num_prompt_tokens: int, num_tokens: int) -> bool:
        """Whether a request of this many prompt tokens, and tokens in all, has room on both sides."""
        return num_prompt_tokens <= self.prefill.num_tokens and num_tokens <= self.decode.num_tokens


class Load(msgspec.Struct):
    """What the router has sent out and not yet seen the end of, by leader's epoch, in tokens.

    last_used orders the groups by when each was last chosen.
    """

    prompt_tokens: Counter[Epoch] = msgspec.field(default_factory=Counter)
    reserved_tokens: Counter[Epoch] = msgspec.field(default_factory=Counter)
    last_used: Counter[Epoch] = msgspec.field(default_factory=Counter)


Policy = Callable[[Sequence[Pair], Load], Pair]
"""Chooses one of the pairs, of which there is at least one."""


def round_robin(pairs: Sequence[Pair], load: Load) -> Pair:
    """The pair whose groups have waited longest for their turn, prefill first."""
    return min(pairs, key=lambda pair: _turn(pair, load))


def least_loaded(pairs: Sequence[Pair], load: Load) -> Pair:
    """Prefill with the fewest prompt tokens outstanding, decode with the fewest tokens reserved; ties take turns."""
    return min(
        pairs,
        key=lambda pair: (
            load.prompt_tokens[pair.prefill.epoch],
            load.reserved_tokens[pair.decode.epoch],
            *_turn(pair, load),
        ),
    )


def _turn(pair: Pair, load: Load) -> tuple[int, int]:
    return load.last_used[pair.prefill.epoch], load.last_used[pair.decode.epoch]


POLICIES: dict[PolicyName, Policy] = {
    "round_robin": round_robin,
    "least_loaded": least_loaded,
}
