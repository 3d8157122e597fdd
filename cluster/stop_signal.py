"""SIGINT, SIGTERM and SIGHUP as a question that the driver's loop asks: has anyone told us to stop?

Made by `up` before anything is started. Nothing is interrupted: whatever step is under way ends first.
"""

import signal
import threading
from types import FrameType


class StopSignal:
    """Takes these signals for as long as the process lives; SIGHUP only where `nohup` did not say to ignore it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._numbers = [signal.SIGINT, signal.SIGTERM] if is_deaf else [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        self.listen()

    def listen(self) -> None:
        """Take the signals; to be called again after something else has taken them, as Ray's start does."""
        for number in self._numbers:
            signal.signal(number, self._hear)

    @property
    def is_asked(self) -> bool:
        return self._event.is_set()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
