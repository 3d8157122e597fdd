"""The receiving side of the zmq transport: one bound socket whose thread receives, checks and answers.

On the wire: a peer's DEALER sends [sequence number, header, payload] and for each gets [sequence number, fault or
nothing] back. An answer without a fault means that the payload was checked and is in staging; where it goes is the main
thread's business. Knows nothing of which transfers are live.
"""

import zmq

from kv_transfer.mailbox import Mailbox
from kv_transfer.plan import FRAME_BYTES
from kv_transfer.transports.intake import accept
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, ReceivingFault
from protocol.identity import Epoch


class ZmqReceiver:
    """A ReceivingTransport. Raises zmq.ZMQError when host cannot be bound."""

    def __init__(self, host: str, timeout_s: float, arrivals: Mailbox[Arrival]) -> None:
        del timeout_s  # this side never waits for a peer
        self.arrivals = arrivals
        self.counters: dict[str, int] = dict.fromkeys(RECEIVING_FAULTS, 0)
        self._listener = Listener(zmq.ROUTER, host, FRAME_BYTES, self._answer, self.counters)
        self.address = self._listener.address

    def close_peer(self, epoch: Epoch) -> None:
        """Nothing to do: connections are the senders', and what a dead one left names an attempt that is over."""

    def close(self) -> None:
        self.arrivals.close()
        self._listener.close()

    def _answer(self, parts: list[zmq.Frame]) -> list[bytes]:
        sender, *message = (part.buffer for part in parts)
        fault = self._accept(message)
        return [bytes(sender), bytes(message[0]) if message else b"", (fault or "").encode()]

    def _accept(self, message: list[memoryview]) -> ReceivingFault | None:
        """Deliver a sound frame, and one of which only the payload is bad; count and return its fault."""
        if len(message) != 3:
            self.counters["bad_message"] += 1
            return "bad_message"
        fault = accept(message[1], message[2], self.arrivals)
        if fault:
            self.counters[fault] += 1
        return fault
