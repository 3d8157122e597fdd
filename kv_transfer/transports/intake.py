"""What becomes of a frame that has arrived: checked, and delivered to the main thread or refused.

Used by all receiving transports on their threads, and by a simulator. Knows nothing of which transfers are live.
"""

from collections.abc import Callable

import torch

from kv_transfer.frames import FrameError, FrameHeader, decode_header
from kv_transfer.mailbox import Mailbox
from kv_transfer.staging import Landing
from kv_transfer.transports.transport import Arrival, ReceivingFault


def _nothing() -> None:
    """Memory that is nobody else's needs no giving back."""


class Intake:
    """One receiving transport's. Counts what it refuses."""

    def __init__(self, arrivals: Mailbox[Arrival], counters: dict[str, int], landing: Landing) -> None:
        self._arrivals = arrivals
        self._counters = counters
        self._landing = landing

    def accept(
        self, header_bytes: bytes | memoryview, payload: torch.Tensor, done: Callable[[], None] = _nothing
    ) -> ReceivingFault | None:
        """As take, for a header that has yet to be read."""
        try:
            header = decode_header(header_bytes)
        except FrameError as error:
            return self._refuse(error)
        return self.take(header, payload, done)

    def take(
        self, header: FrameHeader, payload: torch.Tensor, done: Callable[[], None] = _nothing
    ) -> ReceivingFault | None:
        """Deliver a sound frame, and one of which only the payload is bad; return its fault.

        payload: uint8 [num_bytes]. done is called when a sound one is not read any more, by any thread.
        """
        try:
            landed = self._landing.land(header, payload)
        except FrameError as error:
            self._arrivals.put(Arrival(header, None, error.fault))
            return self._refuse(error)
        if landed is payload:
            self._arrivals.put(Arrival(header, payload, None, done), len(payload))
        else:
            done()
            self._arrivals.put(Arrival(header, landed, None), len(payload))
        return None

    def count(self, fault: ReceivingFault) -> None:
        """Count what went wrong with no frame of its own."""
        self._counters[fault] += 1

    def _refuse(self, error: FrameError) -> ReceivingFault:
        self._counters[error.fault] += 1
        return error.fault
