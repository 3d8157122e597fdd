"""Ends this process when it hangs: a loop, and each layer of a step, give a pulse, and a missing one is the end.

Nobody outside guesses from a silence: a process that has hung is gone, and its connections with it, which is what the
router and the group's other ranks go by. See docs/decisions/0017-dead-mans-switch.md. Given to run_worker by the actor;
where ranks are threads of one process (in tests) nothing is armed.
"""

import faulthandler
import time
from collections.abc import Callable

LEAST_S = 5.0
TIMES_LONGEST_GAP = 5
START_SILENCE_S = 3600.0
"""Between two things that a worker tells of its start: it says little while kernels are compiled."""
CLOSE_WITHIN_S = 10.0
FAILED_CLOSE_WITHIN_S = 3.0
"""When a life has failed the process need not leave in good order, only soon."""

_ARM_EVERY_S = 0.25
_STDERR = 2  # written without Python

Arm = Callable[[float | None], None]
"""Lets the process end in so many seconds, in place of what was said before; None: not at all."""


def end_this_process(in_s: float | None) -> None:
    """An Arm on a thread of its own that needs no interpreter; what every thread was doing goes to stderr first."""
    if in_s is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(in_s, exit=True, file=_STDERR)


def end_nothing(in_s: float | None) -> None:
    """The Arm of ranks that share a process with others."""


class DeadManSwitch:
    """A start and an end may take what allow says; between them every pulse says when the next one is due.

    That is when none has come for several times as long as the longest gap so far, and for least_s.
    """

    def __init__(
        self, arm: Arm = end_nothing, clock: Callable[[], float] = time.monotonic, least_s: float = LEAST_S
    ) -> None:
        self._arm = arm
        self._clock = clock
        self._least_s = least_s
        self._longest_gap_s: float | None = None  # None: pulses do not count
        self._pulsed_at = self._arm_at = 0.0

    def allow(self, seconds: float) -> None:
        """Let what comes now take so long, without pulses."""
        self._longest_gap_s = None
        self._arm(seconds)

    def serve(self, longest_gap_s: float) -> None:
        """Expect pulses from now on, at first with gaps of up to this length."""
        self._longest_gap_s = longest_gap_s
        self._pulsed_at = self._clock()
        self._arm_for_next()

    def pulse(self) -> None:
        """Say that this process goes on; called for every layer of a step, it seldom does more than read a clock."""
        if self._longest_gap_s is None:
            return
        now = self._clock()
        self._longest_gap_s = max(self._longest_gap_s, now - self._pulsed_at)
        self._pulsed_at = now
        if now >= self._arm_at:
            self._arm_for_next()

    def disarm(self) -> None:
        """Expect nothing more."""
        self._longest_gap_s = None
        self._arm(None)

    def _arm_for_next(self) -> None:
        assert self._longest_gap_s is not None
        self._arm_at = self._pulsed_at + _ARM_EVERY_S
        self._arm(max(self._least_s, TIMES_LONGEST_GAP * self._longest_gap_s))
