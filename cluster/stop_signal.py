"""SIGINT and SIGTERM as a question that the driver's loop asks: has anyone told us to stop?

Made by `up` before anything is started. Nothing is interrupted: whatever step is under way ends first.
"""

import signal
import threading
from types import FrameType


class StopSignal:
    """Takes both signals for as long as the process lives."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.listen()

    def listen(self) -> None:
        """Take both signals; to be called again after something else has taken them, as Ray's start does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    @property
    def is_asked(self) -> bool:
        return self._event.is_set()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
