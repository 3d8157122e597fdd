"""What decode holds of a prompt, for prefill to fetch: the same transfer as a handoff, the other way round.

Used by the decode role for attempts that have been granted. The blocks are those of the reservation, which are held at
least until its handoff, and no handoff comes before the fetch is over. One that prefill has given up may go on reading
what was in them; prefill's ranks have forgotten it by then, and nobody uses what comes.
"""

from typing import Protocol

from engine.block_pool import Hold
from engine.role import Outlet, Ranks
from protocol.messages import Fetch, Reserve, Unfetched
from protocol.orders import AnyReport, FetchBroken, SendBlocks


class PrefixServer(Protocol):
    """What the decode role needs of one."""

    def serve(self, fetch: Fetch, reserve: Reserve, hold: Hold, num_held_tokens: int) -> bool:
        """Send prefill what it asks for, out of the first num_held_tokens tokens, or say that it cannot be.

        Return whether it is sent; then not to be asked again for this attempt.
        """

    def heed(self, report: AnyReport) -> None:
        """Take what a rank reports."""


class NoPrefixServer:
    """Prefill computes in these very blocks; there is nothing to fetch."""

    def serve(self, fetch: Fetch, reserve: Reserve, hold: Hold, num_held_tokens: int) -> bool:
        return False

    def heed(self, report: AnyReport) -> None: ...


class RemotePrefixServer:
    """Every rank sends its part."""

    def __init__(self, ranks: Ranks, outlet: Outlet) -> None:
        self._ranks = ranks
        self._outlet = outlet

    def serve(self, fetch: Fetch, reserve: Reserve, hold: Hold, num_held_tokens: int) -> bool:
        first, num_tokens = fetch.first_position, fetch.num_tokens
        if first < 0 or num_tokens < 1 or first + num_tokens > num_held_tokens:
            text = f"tokens {first} to {first + num_tokens} were asked for; {num_held_tokens} are held"
            self._outlet.send(Unfetched(fetch.attempt, text))
            return False
        self._ranks.order(SendBlocks(fetch.attempt, reserve.source, hold.block_ids, first, num_tokens))
        return True

    def heed(self, report: AnyReport) -> None:
        if isinstance(report, FetchBroken):
            self._outlet.send(Unfetched(report.attempt, f"sending KV failed on rank {report.rank}: {report.reason}"))
