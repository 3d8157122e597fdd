"""One request over all its attempts: what it has got so far, and whether a failed attempt is followed by another.

This is what lets a stream outlive its worker (continuation, migration): the next attempt begins with the prompt and all
that was drawn. Pure state, kept by attempts.py; where the next attempt goes is the dispatcher's business.
"""

import msgspec

from protocol.identity import Attempt
from protocol.request import Request
from protocol.stages import Stage
from router.control.events import Outcome
from router.control.lifecycle import Lifecycle

MAX_CRASHES = 2
"""Attempts that a request gets after crashes of workers that computed it. One more crash and it is quarantined: a
request that ends every worker it meets must not walk through the cluster."""
PROGRESS_TOKENS = 16
"""An attempt that drew so many tokens clears its request of earlier crashes and failures."""
MAX_FAILURES = 5
"""Attempts in a row that failed for other reasons (a transfer, no memory), before the client is told."""
FIRST_PAUSE_S = 0.25
"""Before the second attempt after such a failure; the first follows at once, and every later pause is twice as long."""


class Course:
    """request: with all that its attempts have drawn. life: its present attempt's, None while it waits for a pair.

    not_before_s: no attempt begins earlier. attempt: the present one or the last. is_tied: to its first pair, so that
    no other attempt follows.
    """

    def __init__(self, request: Request, deadline_s: float, is_tied: bool = False) -> None:
        self.request = request
        self._is_tied = is_tied
        self.deadline_s = deadline_s
        self.not_before_s = 0.0
        self.num_attempts = 0
        self.life: Lifecycle | None = None
        self.attempt: Attempt | None = None
        self._num_crashes = 0
        self._num_failures = 0

    @property
    def is_suspect(self) -> bool:
        """Whether one more crash would be the last."""
        return self._num_crashes >= MAX_CRASHES

    @property
    def is_proving(self) -> bool:
        """Whether it is suspect, and its present attempt has yet to show that it harms nobody."""
        return self.is_suspect and self.life is not None and self.life.num_drawn < PROGRESS_TOKENS

    def begin(self, life: Lifecycle) -> None:
        """This is its next attempt."""
        self.life, self.attempt = life, life.attempt
        self.num_attempts += 1

    def fail(self, outcome: Outcome, now_s: float) -> Outcome | None:
        """Its attempt has failed. Return how it ends for the client; None when it goes on with another attempt."""
        assert self.life is not None
        drawn, is_suspected = tuple(self.life.token_ids), self.life.was_computed_on
        self.life = None
        self.request = msgspec.structs.replace(
            self.request, generated_token_ids=self.request.generated_token_ids + drawn
        )
        if len(drawn) >= PROGRESS_TOKENS:
            self._num_crashes = self._num_failures = 0
        if self._is_tied:
            return outcome
        match outcome.code:
            case "worker_leaving":
                return None
            case "worker_lost" if is_suspected:
                return self._crash()
            case "worker_lost" | "transfer_failed" | "out_of_memory":
                return self._pause(outcome, now_s)
            case _:
                return outcome

    def _crash(self) -> Outcome | None:
        self._num_crashes += 1
        if self._num_crashes <= MAX_CRASHES:
            return None
        text = f"{self._num_crashes} workers in a row were lost while they computed this request; it is not tried again"
        return Outcome(Stage.FAILED, "quarantined", text)

    def _pause(self, outcome: Outcome, now_s: float) -> Outcome | None:
        self._num_failures += 1
        if self._num_failures > MAX_FAILURES:
            return outcome
        if self._num_failures > 1:
            self.not_before_s = now_s + FIRST_PAUSE_S * 2 ** (self._num_failures - 2)
        return None
