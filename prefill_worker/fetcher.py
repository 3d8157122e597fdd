"""The beginning of a prompt from decode instead of from the model: what decode grew in a conversation's earlier turns.

The prefill role asks its fetcher before it computes a prompt's next chunk. A fetch is for one attempt and happens at
most once: the ranks expect, decode is asked to send, and when every rank has checked every frame the sequence goes on
behind them. Whatever goes wrong, the sequence goes on from where it was, and computes. Its blocks stay held throughout,
and nothing of a fetch that failed is written once its ranks were told to drop it.

Waiting for a grant cannot deadlock: see docs/decisions/0010-fetching-from-decode.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from engine.role import Outlet, Ranks
from engine.sequence import Sequence
from protocol.identity import Attempt
from protocol.messages import Fetch, Grant, Prefill
from protocol.orders import AnyReport, DropTransfer, ExpectBlocks, Expecting, FetchBroken, Received


class Fetcher(Protocol):
    """What the prefill role needs of one."""

    @property
    def counters(self) -> dict[str, int]:
        """What was fetched so far, and how often that failed."""

    def admit(self, prefill: Prefill, sequence: Sequence, grant: Grant | None) -> None:
        """A prompt has its blocks; its grant may have come already."""

    def granted(self, prefill: Prefill, sequence: Sequence, grant: Grant) -> None:
        """The grant of a prompt that was admitted has come."""

    def heed(self, report: AnyReport) -> None:
        """Take what a rank reports."""

    def fail(self, attempt: Attempt) -> None:
        """Nothing more will come of this fetch; unknown attempts are fine."""

    def forget(self, attempt: Attempt) -> None:
        """The attempt is over here, and its ranks have been told; unknown attempts are fine."""

    def is_open(self, attempt: Attempt) -> bool:
        """Whether this prompt waits for what may be fetched: nothing of it is computed or sent meanwhile."""


class NoFetcher:
    """Everything is computed."""

    counters: ClassVar[dict[str, int]] = {}

    def admit(self, prefill: Prefill, sequence: Sequence, grant: Grant | None) -> None: ...

    def granted(self, prefill: Prefill, sequence: Sequence, grant: Grant) -> None: ...

    def heed(self, report: AnyReport) -> None: ...

    def fail(self, attempt: Attempt) -> None: ...

    def forget(self, attempt: Attempt) -> None: ...

    def is_open(self, attempt: Attempt) -> bool:
        return False


@dataclass(eq=False)
class _Fetch:
    """Tokens [first, end) are on their way. The two sets hold the ranks that have not reported yet."""

    sequence: Sequence
    first: int
    end: int
    unready: set[int]
    incomplete: set[int]


class RemoteFetcher:
    """Fetches where decode holds at least min_tokens more than is computed here."""

    def __init__(self, ranks: Ranks, outlet: Outlet, min_tokens: int) -> None:
        self._ranks = ranks
        self._outlet = outlet
        self._min_tokens = min_tokens
        self._ungranted: set[Attempt] = set()
        self._fetches: dict[Attempt, _Fetch] = {}
        self.counters = {"fetches": 0, "fetched_tokens": 0, "failed_fetches": 0}

    def admit(self, prefill: Prefill, sequence: Sequence, grant: Grant | None) -> None:
        if grant is not None:
            self.granted(prefill, sequence, grant)
        elif prefill.num_held_tokens - sequence.num_computed >= self._min_tokens:
            self._ungranted.add(prefill.attempt)

    def granted(self, prefill: Prefill, sequence: Sequence, grant: Grant) -> None:
        attempt, first = prefill.attempt, sequence.num_launched
        self._ungranted.discard(attempt)
        end = min(grant.num_cached_tokens, sequence.num_known_tokens - 1)  # the last token's logits are wanted
        if end - first < self._min_tokens:
            return
        ranks = range(self._ranks.size)
        self._fetches[attempt] = _Fetch(sequence, first, end, unready=set(ranks), incomplete=set(ranks))
        self._ranks.order(ExpectBlocks(attempt, prefill.destination, sequence.hold.block_ids, first, end - first))

    def heed(self, report: AnyReport) -> None:
        if not isinstance(report, Expecting | Received | FetchBroken):
            return
        fetch = self._fetches.get(report.attempt)
        if fetch is None:
            return
        match report:
            case Expecting():
                self._ask_when_ready(fetch, report.rank)
            case Received():
                self._finish_when_complete(fetch, report.rank)
            case FetchBroken():
                self.fail(report.attempt)

    def fail(self, attempt: Attempt) -> None:
        if self._fetches.pop(attempt, None):
            self.counters["failed_fetches"] += 1
            self._ranks.order(DropTransfer(attempt))

    def forget(self, attempt: Attempt) -> None:
        self._ungranted.discard(attempt)
        self._fetches.pop(attempt, None)

    def is_open(self, attempt: Attempt) -> bool:
        return attempt in self._ungranted or attempt in self._fetches

    def _ask_when_ready(self, fetch: _Fetch, rank: int) -> None:
        """A step that was under way when the ranks were told to expect has landed by now."""
        fetch.unready.discard(rank)
        if not fetch.unready:
            self._outlet.send(Fetch(fetch.sequence.attempt, fetch.first, fetch.end - fetch.first))

    def _finish_when_complete(self, fetch: _Fetch, rank: int) -> None:
        fetch.incomplete.discard(rank)
        if fetch.incomplete:
            return
        sequence = fetch.sequence
        self.counters["fetches"] += 1
        self.counters["fetched_tokens"] += fetch.end - fetch.first
        sequence.skip_to(fetch.end)
        del self._fetches[sequence.attempt]
