"""Chooses the pair of groups for a request, and keeps the counts that the choice rests on. Pure: no sockets, no clocks.

Used by router/controller.py. Which groups are ready is router/membership.py's knowledge; the order of preference is
router/policies.py's.
"""

from collections.abc import Hashable, Sequence

import msgspec

from protocol.identity import Attempt
from protocol.request import Request
from router.policies import Cost, Load, Pair, Policy, ReadyGroup


class NoPair(Exception):
    """No pair of groups can take requests now; the message says why."""


class PromptTooLong(Exception):
    """No pair of groups has room for this prompt and one token. num_tokens: what the roomiest pair holds."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the KV cache holds at most {num_tokens} tokens of one request")
        self.num_tokens = num_tokens


class _Family(msgspec.Struct, frozen=True):
    """Groups that fit together: any of prefill may hand over to any of decode."""

    prefill: tuple[ReadyGroup, ...]
    decode: tuple[ReadyGroup, ...]


class Dispatcher:
    """Groups that fit together, and what is outstanding on each side."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._families: tuple[_Family, ...] = ()
        self._why_none = "no worker is ready yet"
        self._num_dispatched = 0
        self._prefilling: dict[Attempt, int] = {}
        self._reserved: dict[Attempt, int] = {}
        self.load = Load()

    @property
    def why_none(self) -> str | None:
        """None while at least one pair can take requests, otherwise the reason why none can."""
        return None if self._families else self._why_none

    def pair_up(self, prefill: Sequence[ReadyGroup], decode: Sequence[ReadyGroup]) -> None:
        """Find out anew who fits together; called when a group became ready or was lost."""
        senders, receivers = _by_kind(prefill), _by_kind(decode)
        self._families = tuple(_Family(tuple(senders[k]), tuple(receivers[k])) for k in senders if k in receivers)
        self._why_none = _missing_roles(prefill, decode)
        if prefill and decode and not self._families:
            self._why_none = f"prefill and decode do not fit together: {incompatibility(prefill[0], decode[0])}"
        self._forget_lost(prefill, decode)

    def colocate(self, groups: Sequence[ReadyGroup]) -> None:
        """As pair_up, for groups that play both roles and pair with themselves only."""
        self._families = tuple(_Family((group,), (group,)) for group in groups)
        self._why_none = "no colocated worker is ready"
        self._forget_lost(groups, groups)

    def capacity(self, num_prompt_tokens: int) -> int:
        """Return the most tokens, prompt included, that some pair can hold for such a prompt. Raises as choose does."""
        if not self._families:
            raise NoPair(self._why_none)
        most = [(_most_tokens(family.prefill), _most_tokens(family.decode)) for family in self._families]
        best = max((decode for prefill, decode in most if prefill >= num_prompt_tokens), default=0)
        if best <= num_prompt_tokens:
            raise PromptTooLong(max(min(both) for both in most))
        return best

    def choose(self, request: Request) -> Pair:
        """Return the pair for request. Raise NoPair or PromptTooLong when there is none."""
        num_prompt_tokens = len(request.prompt_token_ids)
        pairs = [self._best_pair(family, num_prompt_tokens, request.max_num_tokens) for family in self._families]
        found = [pair for pair in pairs if pair is not None]
        if not found:
            raise PromptTooLong(self.capacity(num_prompt_tokens))
        return min(found, key=self._order)

    def _best_pair(self, family: _Family, num_prompt_tokens: int, num_tokens: int) -> Pair | None:
        """Return the best of those with room, on each side by itself; None where one side has none."""
        prefill = self._best(self._policy.prefill, family.prefill, num_prompt_tokens)
        decode = self._best(self._policy.decode, family.decode, num_tokens)
        return Pair(prefill, decode) if prefill and decode else None

    def _best(self, cost: Cost, groups: Sequence[ReadyGroup], num_tokens: int) -> ReadyGroup | None:
        load = self.load
        roomy = (group for group in groups if num_tokens <= group.num_tokens)
        return min(roomy, key=lambda group: (cost(group, load), load.last_used[group.epoch]), default=None)

    def _order(self, pair: Pair) -> tuple[float, ...]:
        """Costs first, then turns, prefill's before decode's."""
        (prefill, decode), load = (pair.prefill, pair.decode), self.load
        costs = self._policy.prefill(prefill, load), self._policy.decode(decode, load)
        return *costs, load.last_used[prefill.epoch], load.last_used[decode.epoch]

    def has_room(self, decode: ReadyGroup, request: Request) -> bool:
        """Whether decode could reserve for request at once, as far as the counts tell."""
        return self.load.reserved_tokens[decode.epoch] + request.max_num_tokens <= decode.num_tokens

    def started(self, attempt: Attempt, request: Request) -> None:
        """Count attempt on both of its sides."""
        self._prefilling[attempt] = len(request.prompt_token_ids)
        self._reserved[attempt] = request.max_num_tokens
        self.load.prompt_tokens[attempt.prefill_epoch] += self._prefilling[attempt]
        self.load.reserved_tokens[attempt.decode_epoch] += self._reserved[attempt]
        self._num_dispatched += 1
        for epoch in (attempt.prefill_epoch, attempt.decode_epoch):
            self.load.last_used[epoch] = self._num_dispatched

    def prefilled(self, attempt: Attempt) -> None:
        """Prefill has nothing left to compute for attempt. Saying so twice does nothing."""
        self.load.prompt_tokens[attempt.prefill_epoch] -= self._prefilling.pop(attempt, 0)

    def ended(self, attempt: Attempt) -> None:
        """Neither side has anything left to do for attempt. Saying so twice does nothing."""
        self.prefilled(attempt)
        self.load.reserved_tokens[attempt.decode_epoch] -= self._reserved.pop(attempt, 0)

    def _forget_lost(self, *ready: Sequence[ReadyGroup]) -> None:
        """Counts of epochs that are gone would pile up over years of restarts."""
        epochs = {group.epoch for groups in ready for group in groups}
        for counts in (self.load.prompt_tokens, self.load.reserved_tokens, self.load.last_used):
            for epoch in [epoch for epoch in counts if epoch not in epochs]:
                del counts[epoch]


def incompatibility(prefill: ReadyGroup, decode: ReadyGroup) -> str | None:
    """Name the first thing that keeps two groups from handing over, with both values; None when they fit."""
    ours, theirs = prefill.endpoint, decode.endpoint
    if ours.transport != theirs.transport:
        return f"transport differs: {ours.transport} and {theirs.transport}"
    return ours.layout.incompatibility(theirs.layout)


def _by_kind(groups: Sequence[ReadyGroup]) -> dict[Hashable, list[ReadyGroup]]:
    """Return the groups by what must be equal for them to fit together."""
    kinds: dict[Hashable, list[ReadyGroup]] = {}
    for group in groups:
        kind = (group.endpoint.transport, *group.endpoint.layout.common.values())
        kinds.setdefault(kind, []).append(group)
    return kinds


def _most_tokens(groups: Sequence[ReadyGroup]) -> int:
    return max(group.num_tokens for group in groups)


def _missing_roles(prefill: Sequence[ReadyGroup], decode: Sequence[ReadyGroup]) -> str:
    missing = [name for name, groups in (("prefill", prefill), ("decode", decode)) if not groups]
    return f"no {' and no '.join(missing)} worker is ready"
