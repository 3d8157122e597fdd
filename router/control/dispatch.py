"""Chooses the pair of groups for a request, and keeps the counts that the choice rests on. Pure: no sockets, no clocks.

Used by controller.py. Which groups are ready is membership.py's knowledge; the order of preference is
policies.py's.
"""

from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import NamedTuple

from protocol.identity import Attempt, Epoch
from protocol.request import Request
from router.control.policies import Cost, Load, Pair, PairKey, Policy, ReadyGroup
from router.control.ranking import Ranking


class NoPair(Exception):
    """No pair of groups can take requests now; the message says why."""


class PromptTooLong(Exception):
    """No pair of groups has room for this prompt and one token. num_tokens: what the roomiest pair holds."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the KV cache holds at most {num_tokens} tokens of one request")
        self.num_tokens = num_tokens


class Need(NamedTuple):
    """What one request asks of a pair. See Dispatcher.choose."""

    num_known_tokens: int
    num_tokens: int
    avoided: AbstractSet[PairKey]
    near: Epoch | None

    def avoided_with(self, prefill: Epoch) -> list[Epoch]:
        """Return the decode groups that this prefill group should not send to."""
        return [decode for sender, decode in self.avoided if sender == prefill]


class _Family:
    """Groups that fit together: any of prefill may hand over to any of decode, so the best two are the best pair."""

    def __init__(self, prefill: Sequence[ReadyGroup], decode: Sequence[ReadyGroup], policy: Policy, load: Load) -> None:
        self._prefill = Ranking(prefill, partial(_cost, [policy.prefill], load))
        self._decode = Ranking(decode, partial(_cost, [policy.decode], load))

    @property
    def most_tokens(self) -> tuple[int, int]:
        """What one request may hold at most, on either side."""
        return self._prefill.most_tokens, self._decode.most_tokens

    def best(self, need: "Need") -> Pair | None:
        """Return the best pair with room that is not avoided; None when there is none."""
        tried: set[Epoch] = set()
        prefill = self._prefill.find(need.near, need.num_known_tokens)
        while prefill := prefill or self._prefill.best(need.num_known_tokens, tried):
            decode = self._decode.best(need.num_tokens, need.avoided_with(prefill.epoch))
            if decode:
                return Pair(prefill, decode)
            tried.add(prefill.epoch)
            prefill = None
        return None

    def cover(self) -> list[Pair]:
        """Return pairs in which every group stands at least once."""
        prefill, decode = self._prefill.groups, self._decode.groups
        return [
            Pair(prefill[index % len(prefill)], decode[index % len(decode)])
            for index in range(max(len(prefill), len(decode)))
        ]

    def moved(self, epoch: Epoch) -> None:
        """What this group is charged with has changed."""
        self._prefill.moved(epoch)
        self._decode.moved(epoch)


class _Colocated:
    """As _Family, of groups that pair with themselves only."""

    def __init__(self, groups: Sequence[ReadyGroup], policy: Policy, load: Load) -> None:
        self._groups = Ranking(groups, partial(_cost, [policy.prefill, policy.decode], load))
        self.moved = self._groups.moved

    @property
    def most_tokens(self) -> tuple[int, int]:
        return self._groups.most_tokens, self._groups.most_tokens

    def cover(self) -> list[Pair]:
        return [Pair(group, group) for group in self._groups.groups]

    def best(self, need: "Need") -> Pair | None:
        group = self._groups.best(need.num_tokens)
        return Pair(group, group) if group else None


class Dispatcher:
    """Groups that fit together, and what is outstanding on each side."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._families: tuple[_Family | _Colocated, ...] = ()
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
        self._families = tuple(
            _Family(senders[kind], receivers[kind], self._policy, self.load) for kind in senders if kind in receivers
        )
        self._why_none = _missing_roles(prefill, decode)
        if prefill and decode and not self._families:
            self._why_none = f"prefill and decode do not fit together: {incompatibility(prefill[0], decode[0])}"
        self._forget_lost(prefill, decode)

    def colocate(self, groups: Sequence[ReadyGroup]) -> None:
        """As pair_up, for groups that play both roles and pair with themselves only."""
        self._families = (_Colocated(groups, self._policy, self.load),) if groups else ()
        self._why_none = "no colocated worker is ready"
        self._forget_lost(groups, groups)

    def capacity(self, num_prompt_tokens: int) -> int:
        """Return the most tokens, prompt included, that some pair can hold for such a prompt. Raises as choose does."""
        if not self._families:
            raise NoPair(self._why_none)
        most = [family.most_tokens for family in self._families]
        best = max((decode for prefill, decode in most if prefill >= num_prompt_tokens), default=0)
        if best <= num_prompt_tokens:
            raise PromptTooLong(max(min(both) for both in most))
        return best

    def choose(self, request: Request, avoided: AbstractSet[PairKey] = frozenset(), near: Epoch | None = None) -> Pair:
        """Return the pair for request. Raise NoPair or PromptTooLong when there is none.

        avoided: pairs, by epochs of prefill and decode, that are taken only where there is no other. near: the prefill
        group to prefer, because it has computed the request before and may still hold it.
        """
        need = Need(request.num_known_tokens, request.max_num_tokens, avoided, near)
        pair = self._best(need) or (self._best(need._replace(avoided=frozenset())) if avoided else None)
        if pair is None:
            raise PromptTooLong(self.capacity(request.num_known_tokens))
        return pair

    def _best(self, need: "Need") -> Pair | None:
        pairs = [family.best(need) for family in self._families]
        found = [pair for pair in pairs if pair is not None]
        return min(found, key=self._order) if len(found) > 1 else next(iter(found), None)

    def cover(self) -> list[Pair]:
        """Return pairs in which every group that can serve stands at least once."""
        return [pair for family in self._families for pair in family.cover()]

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
        self._prefilling[attempt] = request.num_known_tokens
        self._reserved[attempt] = request.max_num_tokens
        self.load.prompt_tokens[attempt.prefill_epoch] += self._prefilling[attempt]
        self.load.reserved_tokens[attempt.decode_epoch] += self._reserved[attempt]
        self._num_dispatched += 1
        for epoch in (attempt.prefill_epoch, attempt.decode_epoch):
            self.load.last_used[epoch] = self._num_dispatched
        self._moved(attempt)

    def prefilled(self, attempt: Attempt) -> None:
        """Prefill has nothing left to compute for attempt. Saying so twice does nothing."""
        if num_tokens := self._prefilling.pop(attempt, 0):
            self.load.prompt_tokens[attempt.prefill_epoch] -= num_tokens
            self._moved(attempt)

    def ended(self, attempt: Attempt) -> None:
        """Neither side has anything left to do for attempt. Saying so twice does nothing."""
        self.prefilled(attempt)
        if num_tokens := self._reserved.pop(attempt, 0):
            self.load.reserved_tokens[attempt.decode_epoch] -= num_tokens
            self._moved(attempt)

    def _moved(self, attempt: Attempt) -> None:
        for family in self._families:
            for epoch in {attempt.prefill_epoch, attempt.decode_epoch}:
                family.moved(epoch)

    def _forget_lost(self, *ready: Sequence[ReadyGroup]) -> None:
        """Counts of epochs that are gone would pile up over years of restarts."""
        epochs = {group.epoch for groups in ready for group in groups}
        for counts in (self.load.prompt_tokens, self.load.reserved_tokens, self.load.last_used):
            for epoch in [epoch for epoch in counts if epoch not in epochs]:
                del counts[epoch]


def _cost(costs: Sequence[Cost], load: Load, group: ReadyGroup) -> tuple[float, ...]:
    """Equal costs take turns."""
    return *(cost(group, load) for cost in costs), load.last_used[group.epoch]


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


def _missing_roles(prefill: Sequence[ReadyGroup], decode: Sequence[ReadyGroup]) -> str:
    missing = [name for name, groups in (("prefill", prefill), ("decode", decode)) if not groups]
    return f"no {' and no '.join(missing)} worker is ready"
