"""The receiving side of the zmq transport: one bound socket whose thread receives, checks and answers.

On the wire: a peer's DEALER sends [GREETING, greeting] once and gets [GREETING, why it is refused or nothing] back;
then [sequence number, header, payload], and for each gets [sequence number, fault or nothing] back. An answer without a
fault means that the payload was checked and is in staging; where it goes is the main thread's business. Knows nothing
of which transfers are live.
"""

import zmq

from kv_transfer.handshake import refusal
from kv_transfer.mailbox import Mailbox
from kv_transfer.plan import FRAME_BYTES
from kv_transfer.staging import landing_for
from kv_transfer.transports.intake import Intake, as_payload
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, ReceivingFault, Site
from protocol.identity import Epoch

GREETING = b"greeting"


class ZmqReceiver:
    """A ReceivingTransport. Raises zmq.ZMQError when the site's host cannot be bound. Never waits for a peer."""

    def __init__(self, site: Site, arrivals: Mailbox[Arrival]) -> None:
        self.arrivals = arrivals
        self.counters: dict[str, int] = dict.fromkeys(RECEIVING_FAULTS, 0)
        self._layout = site.layout
        self._intake = Intake(arrivals, self.counters, landing_for(site.device))
        self._listener = Listener(zmq.ROUTER, site.host, FRAME_BYTES, self._answer, self.counters)
        self.address = self._listener.address

    def close_peer(self, epoch: Epoch) -> None:
        """Nothing to do: connections are the senders', and what a dead one left names an attempt that is over."""

    def close(self) -> None:
        self.arrivals.close()
        self._listener.close()

    def _answer(self, parts: list[zmq.Frame]) -> list[bytes]:
        sender, *message = (part.buffer for part in parts)
        if len(message) == 2 and message[0] == GREETING:
            return [bytes(sender), GREETING, self._refusal(message[1]).encode()]
        fault = self._accept(message)
        return [bytes(sender), bytes(message[0]) if message else b"", (fault or "").encode()]

    def _refusal(self, greeting: memoryview) -> str:
        reason = refusal(self._layout, greeting)
        self.counters["refused_peer"] += bool(reason)
        return reason

    def _accept(self, message: list[memoryview]) -> ReceivingFault | None:
        if len(message) != 3:
            self.counters["bad_message"] += 1
            return "bad_message"
        return self._intake.accept(message[1], as_payload(message[2]))
