"""What makes one group a better choice than another. Policies see the router's own counts, never stale heartbeats.

Used by dispatch.py, which looks at each side by itself, so that a thousand groups are not a million pairs.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from protocol.identity import Epoch
from protocol.layout import Endpoint
from protocol.topology import PolicyName


class ReadyGroup(msgspec.Struct, frozen=True):
    """A group that takes requests. num_tokens: what one request may hold in its pool at most."""

    group: int
    epoch: Epoch
    endpoint: Endpoint
    num_tokens: int


PairKey = tuple[Epoch, Epoch]
"""The epochs of a pair's prefill and decode group."""


class Pair(msgspec.Struct, frozen=True):
    """A prefill and a decode group that can serve a request together; both are one group when it is colocated."""

    prefill: ReadyGroup
    decode: ReadyGroup

    @property
    def key(self) -> PairKey:
        return self.prefill.epoch, self.decode.epoch


class Load(msgspec.Struct):
    """What the router has sent out and not yet seen the end of, by leader's epoch, in tokens.

    last_used orders the groups by when each was last chosen.
    """

    prompt_tokens: Counter[Epoch] = msgspec.field(default_factory=Counter)
    reserved_tokens: Counter[Epoch] = msgspec.field(default_factory=Counter)
    last_used: Counter[Epoch] = msgspec.field(default_factory=Counter)


Cost = Callable[[ReadyGroup, Load], float]


class Policy(NamedTuple):
    """What it would cost a group, on either side, to take the next request. The least cost gets it; equals take turns.

    It follows from the load alone, so that costs are compared anew only where the load has changed.
    """

    prefill: Cost
    decode: Cost


def _nothing(group: ReadyGroup, load: Load) -> float:
    return 0


def _prompt_tokens(group: ReadyGroup, load: Load) -> float:
    return load.prompt_tokens[group.epoch]


def _reserved_tokens(group: ReadyGroup, load: Load) -> float:
    return load.reserved_tokens[group.epoch]


POLICIES: dict[PolicyName, Policy] = {
    "round_robin": Policy(prefill=_nothing, decode=_nothing),
    "least_loaded": Policy(prefill=_prompt_tokens, decode=_reserved_tokens),
}
