"""What a worker asks of each role it plays. A role is a scheduling policy over an engine (a scheduler), no more.

prefill_worker and decode_worker each have one; a colocated worker plays both over one block pool. The worker's loop
talks to roles through this protocol only.
"""

from typing import Protocol

from engine.sampler import Drawn
from engine.sequence import Chunk
from protocol.errors import FailureCode
from protocol.messages import AnyMessage, TokenUpdate
from protocol.orders import AnyOrder, AnyReport


class Role(Protocol):
    """One role of one worker."""

    def receive(self, message: AnyMessage) -> None:
        """Take a message of the control plane. One that is meant for another role is ignored."""

    def heed(self, report: AnyReport) -> None:
        """Take what a rank of this group reports about a transfer."""

    def schedule(self, num_tokens: int) -> list[Chunk]:
        """Return this role's part of the next forward pass: at most num_tokens tokens in all."""

    def commit(self, chunk: Chunk, drawn: list[Drawn]) -> None:
        """Take what came of a chunk that this role scheduled: one for each of its wanted positions.

        A chunk of a sequence that was dropped in the meantime is ignored.
        """

    def fail(self, chunk: Chunk, code: FailureCode, message: str) -> None:
        """End the request of a chunk that this role scheduled and that could not be computed."""

    def drop_all(self) -> None:
        """Let go of everything, because the worker ends."""

    @property
    def counters(self) -> dict[str, int]:
        """What this role counts, by name; it goes into the heartbeat."""

    @property
    def num_running(self) -> int:
        """Requests that are being computed or decoded."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait for blocks, for a grant, or for their KV."""


class Outlet(Protocol):
    """Where a role's messages go: in the order they were given, as soon as the loop comes round."""

    def send(self, message: AnyMessage) -> None:
        """Send to the router."""

    def emit(self, update: TokenUpdate) -> None:
        """Send a token; tokens that follow one another travel as one message."""


class Ranks(Protocol):
    """All ranks of the group, as a role sees them."""

    @property
    def size(self) -> int:
        """How many there are; they are numbered from 0."""

    def order(self, order: AnyOrder) -> None:
        """Have every rank carry this out, after everything that was ordered before."""
