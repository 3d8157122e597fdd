"""The receiving side of the tcp transport: payloads come after their headers, into buffers that are used again.

Who may send is listener.py's business; which transfers are live is known above.
"""

from functools import partial

import torch

from kv_transfer.handshake import Hello
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.buffers import Buffers, host_buffers
from kv_transfer.transports.connection import Connection
from kv_transfer.transports.intake import Intake
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.tcp.address import address_of, listening_on
from kv_transfer.transports.transport import Arrival, Site
from kv_transfer.transports.wire import Announced, decode_frame, encode_answer


class TcpSession:
    """See listener.Session."""

    def __init__(self, connection: Connection, intake: Intake, buffers: Buffers) -> None:
        self._connection = connection
        self._intake = intake
        self._buffers = buffers
        self._under_way: tuple[Announced, torch.Tensor] | None = None
        self._num_missing = 0  # bytes of its payload

    def serve(self) -> None:
        while self._under_way or self._begin():
            assert self._under_way
            announced, payload = self._under_way
            self._num_missing -= self._connection.receive_into(payload.numpy().data[-self._num_missing :])
            if self._num_missing:
                return
            self._under_way = None
            self._take(announced, payload)

    def close(self) -> None:
        self._under_way = None

    def _begin(self) -> bool:
        message = self._connection.receive()
        if message is None:
            return False
        announced = decode_frame(message)
        self._under_way = announced, self._buffers.take(announced.num_bytes)
        self._num_missing = announced.num_bytes
        return True

    def _take(self, announced: Announced, payload: torch.Tensor) -> None:
        """Answer when the payload was checked and is in staging; where it goes is the main thread's business."""
        fault = self._intake.accept(announced.header, payload, partial(self._buffers.give_back, payload))
        self._connection.answer(encode_answer(announced.sequence, (fault or "").encode()))


def open_tcp_receiver(site: Site, arrivals: Mailbox[Arrival]) -> Listener:
    """Return a ReceivingTransport over TCP. Raises OSError when the site's host cannot be bound."""
    buffers = host_buffers(site.device)

    def open_session(connection: Connection, hello: Hello, fds: list[int], intake: Intake) -> TcpSession:
        return TcpSession(connection, intake, buffers)

    listening = listening_on(site.host)
    return Listener(listening, address_of(listening), site, arrivals, open_session)
