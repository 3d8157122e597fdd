"""Where a finished prompt goes: over a transport to another group, or nowhere at all when decode is in this very group.

The prefill role asks its outbox for blocks and tells it to send; which of the two it has is decided when the worker is
put together, and the role never knows.
"""

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from engine.block_pool import BlockPool, Hold
from engine.role import Ranks
from engine.sequence import Sequence
from kv_transfer.plan import manifest_of
from kv_transfer.transports.loopback import Loopback
from protocol.identity import Attempt
from protocol.layout import Endpoint, KVLayout
from protocol.messages import Manifest
from protocol.orders import DropTransfer, SendBlocks, SendMore


class Outbox(Protocol):
    """What the prefill role needs of one.

    max_ungranted_blocks: how many blocks prompts may hold that have no grant yet; None: as many as there are.
    """

    @property
    def max_ungranted_blocks(self) -> int | None: ...

    def would_fit(self, names: SequenceOf[bytes], num_blocks: int, without: SequenceOf[Hold]) -> bool:
        """Whether claim would return blocks if the holds in without were released first."""

    def claim(self, attempt: Attempt, names: SequenceOf[bytes], num_blocks: int) -> Hold | None:
        """Return blocks for a prompt, or None while there are none."""

    def send(self, sequence: Sequence, destination: Endpoint, first_position: int) -> None:
        """Start sending a prompt's KV from first_position on: what is computed now, the rest as send_more says."""

    def send_more(self, sequence: Sequence) -> None:
        """More of a prompt that is being sent has been computed, perhaps all of it."""

    def manifest(self, sequence: Sequence, destination: Endpoint, first_position: int) -> Manifest:
        """Return what all frames of a prompt add up to."""

    def drop(self, attempt: Attempt) -> None:
        """Send nothing more of this attempt."""


class RemoteOutbox:
    """Blocks come from this group's own pool; every rank sends its part of their content."""

    def __init__(self, pool: BlockPool, ranks: Ranks, layout: KVLayout, share: float) -> None:
        """share: of the pool's blocks, what prompts without a grant may hold."""
        self._pool = pool
        self._ranks = ranks
        self._layout = layout
        self.max_ungranted_blocks = int(share * pool.num_blocks)

    def would_fit(self, names: SequenceOf[bytes], num_blocks: int, without: SequenceOf[Hold]) -> bool:
        return self._pool.would_fit(names, num_blocks, without)

    def claim(self, attempt: Attempt, names: SequenceOf[bytes], num_blocks: int) -> Hold | None:
        return self._pool.acquire(names, num_blocks)

    def send(self, sequence: Sequence, destination: Endpoint, first_position: int) -> None:
        num_tokens, block_ids = sequence.num_known_tokens - first_position, sequence.hold.block_ids
        sequence.is_leaving = True
        self._ranks.order(
            SendBlocks(sequence.attempt, destination, block_ids, first_position, num_tokens, sequence.num_computed)
        )

    def send_more(self, sequence: Sequence) -> None:
        self._ranks.order(SendMore(sequence.attempt, sequence.num_computed))

    def manifest(self, sequence: Sequence, destination: Endpoint, first_position: int) -> Manifest:
        num_tokens = sequence.num_known_tokens - first_position
        return manifest_of(self._layout, destination.layout, first_position, num_tokens)

    def drop(self, attempt: Attempt) -> None:
        self._ranks.order(DropTransfer(attempt))


class LoopbackOutbox:
    """Blocks are those that the decode role of this group reserved; a computed prompt is already where it belongs."""

    max_ungranted_blocks = None

    def __init__(self, loopback: Loopback[Hold]) -> None:
        self._loopback = loopback

    def would_fit(self, names: SequenceOf[bytes], num_blocks: int, without: SequenceOf[Hold]) -> bool:
        return False  # a reservation is offered or it is not

    def claim(self, attempt: Attempt, names: SequenceOf[bytes], num_blocks: int) -> Hold | None:
        hold = self._loopback.adopt(attempt)
        return hold.share() if hold else None

    def send(self, sequence: Sequence, destination: Endpoint, first_position: int) -> None:
        """It is there already."""

    def send_more(self, sequence: Sequence) -> None:
        """It is there already."""

    def manifest(self, sequence: Sequence, destination: Endpoint, first_position: int) -> Manifest:
        return Manifest(first_position, sequence.num_known_tokens - first_position, num_frames=0, num_bytes=0)

    def drop(self, attempt: Attempt) -> None:
        """Nothing is under way."""
