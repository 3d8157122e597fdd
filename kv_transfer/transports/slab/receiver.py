"""The receiving side of shm and cuda_ipc: payloads are checked where they lie, in the senders' slabs.

A slot is staging: it belongs to this side from its frame's message until the answer, which the main thread gives when
it has copied the payload (or the listener's thread, when there is nothing to copy). Who may send is listener.py's
business.
"""

from collections.abc import Callable
from functools import partial

from kv_transfer.handshake import Hello, RefusedError
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.connection import Connection
from kv_transfer.transports.intake import Intake
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.slab.host_slab import Lent, Slab
from kv_transfer.transports.slab.reach import Reach, listening_here
from kv_transfer.transports.transport import Arrival, Site
from kv_transfer.transports.wire import decode_frame, encode_answer

OpenSlab = Callable[[Lent], Slab]
"""Raises ValueError or OSError for what cannot be opened."""


class SlabSession:
    """See listener.Session."""

    def __init__(self, connection: Connection, intake: Intake, slab: Slab) -> None:
        self._connection = connection
        self._intake = intake
        self._slab = slab

    def serve(self) -> None:
        while (message := self._connection.receive()) is not None:
            announced = decode_frame(message)
            payload = self._slab.slot(announced.slot, announced.num_bytes)
            fault = self._intake.accept(announced.header, payload, partial(self._answer, announced.sequence))
            if fault:
                self._answer(announced.sequence, fault)

    def close(self) -> None:
        """The slab goes when nobody answers for one of its slots any more."""

    def _answer(self, sequence: int, fault: str = "") -> None:
        self._connection.answer(encode_answer(sequence, fault.encode()))


def open_slab_receiver(reach: Reach, open_slab: OpenSlab, site: Site, arrivals: Mailbox[Arrival]) -> Listener:
    """Return a ReceivingTransport that senders of this host reach. It listens on no network."""

    def open_session(connection: Connection, hello: Hello, fds: list[int], intake: Intake) -> SlabSession:
        if len(fds) != 1:
            raise ValueError(f"a hello with {len(fds)} descriptors; a slab has one")
        try:
            return SlabSession(connection, intake, open_slab(Lent(hello.extra, fds[0])))
        except OSError as error:
            raise RefusedError(str(error)) from error

    listening = listening_here()
    return Listener(listening, reach.address_of(listening), site, arrivals, open_session)
