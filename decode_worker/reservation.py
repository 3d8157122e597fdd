"""One request on its way through the decode role: waiting, arriving, running, or parked. Decides nothing."""

from dataclasses import dataclass

from engine.block_pool import Hold
from engine.prefix_hash import HashChain
from engine.sequence import Sequence
from protocol.identity import Attempt
from protocol.messages import Handoff, Reserve


@dataclass(eq=False)
class Reservation:
    """number: its place in the order of arrival. unready, incomplete: the ranks that have not reported yet.

    hold is None while it waits, and while it is parked.
    """

    reserve: Reserve
    number: int
    chain: HashChain
    unready: set[int]
    incomplete: set[int]
    hold: Hold | None = None
    is_granted: bool = False
    is_fetched: bool = False
    handoff: Handoff | None = None
    sequence: Sequence | None = None

    @property
    def attempt(self) -> Attempt:
        return self.reserve.attempt

    @property
    def num_known_tokens(self) -> int:
        return self.reserve.request.num_known_tokens

    @property
    def placed(self) -> tuple[Sequence, Hold]:
        """Its sequence and blocks, both of which it has while it runs."""
        assert self.sequence is not None
        assert self.hold is not None
        return self.sequence, self.hold

    @property
    def max_num_computed(self) -> int:
        """How many tokens' KV there can ever be: that of the last output token is never computed."""
        return self.reserve.request.max_num_tokens - 1
