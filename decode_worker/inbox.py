"""Where a prompt's KV comes from: over a transport from another group, or from prefill in this very group.

The decode role tells its inbox what to expect; which of the two it has is decided when the worker is put together, and
the role never knows.
"""

from typing import Protocol

from engine.block_pool import Hold
from engine.role import Ranks
from kv_transfer.plan import manifest_of
from kv_transfer.transports.loopback import Loopback
from protocol.identity import Attempt
from protocol.layout import KVLayout
from protocol.messages import Manifest, Reserve
from protocol.orders import DropTransfer, ExpectBlocks


class Inbox(Protocol):
    """What the decode role needs of one."""

    @property
    def num_reporting(self) -> int:
        """How many ranks report Expecting and Received for each transfer; numbered from 0."""

    def expect(self, reserve: Reserve, hold: Hold, first_position: int) -> None:
        """Let KV of the prompt from first_position on come into hold's blocks."""

    def manifest(self, reserve: Reserve, first_position: int) -> Manifest:
        """Return what all frames of this transfer must add up to."""

    def drop(self, attempt: Attempt) -> None:
        """Let nothing more of this attempt in."""


class RemoteInbox:
    """Every rank receives its part of the frames, checks it and copies it in."""

    def __init__(self, ranks: Ranks, layout: KVLayout) -> None:
        self._ranks = ranks
        self._layout = layout

    @property
    def num_reporting(self) -> int:
        return self._ranks.size

    def expect(self, reserve: Reserve, hold: Hold, first_position: int) -> None:
        num_tokens = reserve.request.num_known_tokens - first_position
        self._ranks.order(ExpectBlocks(reserve.attempt, reserve.source, hold.block_ids, first_position, num_tokens))

    def manifest(self, reserve: Reserve, first_position: int) -> Manifest:
        num_tokens = reserve.request.num_known_tokens - first_position
        return manifest_of(reserve.source.layout, self._layout, first_position, num_tokens)

    def drop(self, attempt: Attempt) -> None:
        self._ranks.order(DropTransfer(attempt))


class LoopbackInbox:
    """Prefill computes straight into the reserved blocks; there is nothing to receive."""

    num_reporting = 0

    def __init__(self, loopback: Loopback[Hold]) -> None:
        self._loopback = loopback

    def expect(self, reserve: Reserve, hold: Hold, first_position: int) -> None:
        self._loopback.offer(reserve.attempt, hold)

    def manifest(self, reserve: Reserve, first_position: int) -> Manifest:
        num_tokens = reserve.request.num_known_tokens - first_position
        return Manifest(first_position, num_tokens, num_frames=0, num_bytes=0)

    def drop(self, attempt: Attempt) -> None:
        self._loopback.drop(attempt)
