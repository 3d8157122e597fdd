"""Which prompt gets blocks next on a prefill group, and which gives up its own for that.

Called by the prefill role. Without a grant, prompts are computed ahead of time in blocks that nothing better needs: up
to the outbox's limit, and until a prompt with a grant wants them. So what decode has room for never waits for what it
has no room for (docs/decisions/0003-no-deadlock.md). Grants and the limit are the backpressure of decode on prefill.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.block_pool import Hold
from engine.prefix_hash import HashChain
from engine.sequence import Sequence
from prefill_worker.outbox import Outbox
from protocol.messages import Grant, Prefill


@dataclass(eq=False)
class Job:
    """One prompt on its way through the prefill role; sequence is None while it has no blocks."""

    prefill: Prefill
    chain: HashChain
    num_blocks: int
    sequence: Sequence | None = None
    grant: Grant | None = None
    first_token_id: int | None = None  # which the client has, even when the KV was given up since
    is_sending: bool = False
    computed_at: float | None = None  # monotonic

    @property
    def names(self) -> list[bytes]:
        """Names of blocks that need not be computed."""
        return self.chain.of_held(self.prefill.request)


class Admission:
    """Two queues, granted prompts first, each first come, first served; and who holds blocks without a grant.

    give_up: called with a job whose blocks must be free when it returns.
    """

    def __init__(self, outbox: Outbox, give_up: Callable[[Job], None]) -> None:
        self._outbox = outbox
        self._give_up = give_up
        self._granted: deque[Job] = deque()
        self._ungranted: deque[Job] = deque()
        self._ahead: list[Job] = []  # hold blocks without a grant, oldest first
        self.num_given_up = 0

    @property
    def is_granted_next(self) -> bool:
        """Whether the next prompt to be admitted has a grant."""
        return bool(self._granted)

    def enter(self, job: Job) -> None:
        """A prompt has come; it has neither blocks nor a grant."""
        self._ungranted.append(job)

    def grant(self, job: Job) -> None:
        """Its grant has come: from now on it waits for nobody without one."""
        if job.sequence is None:
            self._ungranted.remove(job)
            self._granted.append(job)
        else:
            self._ahead.remove(job)

    def leave(self, job: Job) -> None:
        """It is over, and will release its blocks itself."""
        if job.sequence is None:
            (self._ungranted if job.grant is None else self._granted).remove(job)
        elif job.grant is None:
            self._ahead.remove(job)

    def admit(self) -> tuple[Job, Hold] | None:
        """Return the next prompt with blocks for it; None when that one must wait, for then all others wait too."""
        jobs = self._granted or self._ungranted
        hold = self._claim(jobs[0]) if jobs else None
        if hold is None:
            return None
        job = jobs.popleft()
        if job.grant is None:
            self._ahead.append(job)
        return job, hold

    def _claim(self, job: Job) -> Hold | None:
        if job.grant is None:
            return self._try(job) if self._has_place(job) else None
        hold = self._try(job)
        if hold is None and self._outbox.would_fit(
            job.names, job.num_blocks, [_hold_of(other) for other in self._ahead]
        ):
            while hold is None:
                self._set_back(self._ahead.pop())
                hold = self._try(job)
        return hold

    def _try(self, job: Job) -> Hold | None:
        return self._outbox.claim(job.prefill.attempt, job.names, job.num_blocks)

    def _has_place(self, job: Job) -> bool:
        """Whether the outbox may hold this one as well. Blocks that prompts share count for each of them."""
        limit = self._outbox.max_ungranted_blocks
        return limit is None or sum(other.num_blocks for other in self._ahead) + job.num_blocks <= limit

    def _set_back(self, job: Job) -> None:
        """The youngest comes back as the first that waits: all others that wait are younger."""
        self._give_up(job)
        self._ungranted.appendleft(job)
        self.num_given_up += 1


def _hold_of(job: Job) -> Hold:
    assert job.sequence is not None
    return job.sequence.hold
