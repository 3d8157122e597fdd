"""Chooses the pair of groups for a request, and keeps the counts that the choice rests on. Pure: no sockets, no clocks.

Used by router/controller.py. Which groups are ready is router/membership.py's knowledge; the order of preference is
router/policies.py's.
"""

import itertools
from collections.abc import Sequence

from protocol.identity import Attempt
from protocol.request import Request
from router.policies import Load, Pair, Policy, ReadyGroup


class NoPair(Exception):
    """No pair of groups can take requests now; the message says why."""


class PromptTooLong(Exception):
    """No pair of groups has room for this prompt and one token. num_tokens: what the roomiest pair holds."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the KV cache holds at most {num_tokens} tokens of one request")
        self.num_tokens = num_tokens


class Dispatcher:
    """Pairs that fit together, and what is outstanding on each side."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._pairs: tuple[Pair, ...] = ()
        self._why_none = "no worker is ready yet"
        self._num_dispatched = 0
        self._prefilling: dict[Attempt, int] = {}
        self._reserved: dict[Attempt, int] = {}
        self.load = Load()

    @property
    def why_none(self) -> str | None:
        """None while at least one pair can take requests, otherwise the reason why none can."""
        return None if self._pairs else self._why_none

    def pair_up(self, prefill: Sequence[ReadyGroup], decode: Sequence[ReadyGroup]) -> None:
        """Recompute the pairs; called when a group became ready or was lost."""
        problems = {(p.epoch, d.epoch): incompatibility(p, d) for p, d in itertools.product(prefill, decode)}
        self._pairs = tuple(
            Pair(p, d) for p, d in itertools.product(prefill, decode) if problems[p.epoch, d.epoch] is None
        )
        self._why_none = next(
            (f"prefill and decode do not fit together: {problem}" for problem in problems.values() if problem),
            _missing_roles(prefill, decode),
        )
        self._forget_lost(prefill, decode)

    def colocate(self, groups: Sequence[ReadyGroup]) -> None:
        """As pair_up, for groups that play both roles and pair with themselves only."""
        self._pairs = tuple(Pair(group, group) for group in groups)
        self._why_none = "no colocated worker is ready"
        self._forget_lost(groups, groups)

    def capacity(self, num_prompt_tokens: int) -> int:
        """Return the most tokens, prompt included, that some pair can hold for such a prompt. Raises as choose does."""
        if not self._pairs:
            raise NoPair(self._why_none)
        best = max((p.decode.num_tokens for p in self._pairs if p.prefill.num_tokens >= num_prompt_tokens), default=0)
        if best <= num_prompt_tokens:
            raise PromptTooLong(max(min(p.prefill.num_tokens, p.decode.num_tokens) for p in self._pairs))
        return best

    def choose(self, request: Request) -> Pair:
        """Return the pair for request. Raise NoPair or PromptTooLong when there is none."""
        num_prompt_tokens = len(request.prompt_token_ids)
        roomy = [pair for pair in self._pairs if pair.fits(num_prompt_tokens, request.max_num_tokens)]
        if not roomy:
            raise PromptTooLong(self.capacity(num_prompt_tokens))
        return self._policy(roomy, self.load)

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


def _missing_roles(prefill: Sequence[ReadyGroup], decode: Sequence[ReadyGroup]) -> str:
    missing = [name for name, groups in (("prefill", prefill), ("decode", decode)) if not groups]
    return f"no {' and no '.join(missing)} worker is ready"
