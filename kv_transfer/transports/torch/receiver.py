"""The receiving side of the torch transports: headers through a connection, payloads through a communicator beside it.

Every sender's pair has its own thread and communicator (pair.py), so that a stalled or dead one costs its own pair
only. On any failure the pair is given up; the sender opens another when it needs one. Where payloads land, the host's
memory or a GPU, is what gloo and nccl differ in: see factories.py. Who may send is listener.py's business.
"""

import logging
from functools import partial
from weakref import WeakSet

from kv_transfer.frames import FrameHeader, decode_header
from kv_transfer.handshake import Hello
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.connection import Connection
from kv_transfer.transports.intake import Intake
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.tcp.address import address_of, listening_on
from kv_transfer.transports.torch.communicator import RECEIVER, Backend, Communicator
from kv_transfer.transports.torch.pair import RENDEZVOUS, ConnectionStore, PairEnd, Pairs, wait_closed
from kv_transfer.transports.transport import Arrival, Site
from kv_transfer.transports.wire import Announced, decode_answer, decode_frame, encode_answer

MAX_QUEUED_HEADERS = 16
"""A sender announces a frame, then waits until it is taken; one that is further ahead is not ours."""

_log = logging.getLogger(__name__)


class TorchSession:
    """See listener.Session. The pair is opened when the sender first says something, which is when it is open there."""

    def __init__(
        self, connection: Connection, hello: Hello, intake: Intake, backend: Backend, timeout_s: float, pairs: Pairs
    ) -> None:
        self._connection = connection
        self._rank = hello.rank
        self._intake = intake
        self._backend = backend
        self._store = ConnectionStore(connection.answer, timeout_s)
        self._pairs = pairs
        self._pair: PairEnd[tuple[Announced, FrameHeader]] | None = None

    def serve(self) -> None:
        while (message := self._connection.receive()) is not None:
            pair = self._pair or self._open_pair()
            sequence, said = decode_answer(message)
            if sequence == RENDEZVOUS:
                self._store.hear(said)
            elif pair.num_waiting >= MAX_QUEUED_HEADERS:
                raise ValueError(f"more than {MAX_QUEUED_HEADERS} frames are announced at once")
            else:
                announced = decode_frame(message)
                pair.put((announced, decode_header(announced.header)))

    def close(self) -> None:
        if self._pair:
            self._pair.close()

    def _open_pair(self) -> PairEnd[tuple[Announced, FrameHeader]]:
        self._pair = PairEnd(self._backend, RECEIVER, self._store, self._receive, self._give_up)
        self._pairs.add(self._pair)
        return self._pair

    # --- everything below runs on the pair's own thread ---------------------------------------------------------------

    def _receive(self, communicator: Communicator, item: tuple[Announced, FrameHeader]) -> None:
        (announced, header), buffers = item, self._backend.buffers
        payload = buffers.take(announced.num_bytes)
        try:
            communicator.receive(payload)
        except Exception:
            communicator.abort()  # before anybody else may use that memory
            raise
        fault = self._intake.take(header, payload, partial(buffers.give_back, payload))
        self._connection.answer(encode_answer(announced.sequence, (fault or "").encode()))

    def _give_up(self, error: Exception) -> None:
        """What was announced and has not come is sent again by whoever lives."""
        _log.warning("KV pair from rank %s given up: %s", self._rank, error)
        self._intake.count("broken_pair")
        self._connection.hang_up()


class TorchReceiver(Listener):
    """A ReceivingTransport. Raises OSError when the site's host cannot be bound."""

    def __init__(self, backend: Backend, site: Site, arrivals: Mailbox[Arrival]) -> None:
        self._pairs: Pairs = WeakSet()

        def open_session(connection: Connection, hello: Hello, fds: list[int], intake: Intake) -> TorchSession:
            return TorchSession(connection, hello, intake, backend, site.timeout_s, self._pairs)

        listening = listening_on(site.host)
        super().__init__(listening, address_of(listening), site, arrivals, open_session)

    def close(self) -> None:
        super().close()
        wait_closed(self._pairs)
