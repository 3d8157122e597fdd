"""What the Peers of all transports have in common: a connection that greets first, then takes frames and answers.

See handshake.py for the greeting, wire.py for what follows, peers.py for who decides when a connection is given up. How
payloads travel is left to the transports' own Peers.
"""

import socket

from kv_transfer.frames import encode_header
from kv_transfer.handshake import Caller, Hello
from kv_transfer.transports.connection import Connection
from kv_transfer.transports.transport import OutgoingFrame, Site
from kv_transfer.transports.wire import MAX_ANSWER_BYTES, Announced, decode_answer, encode_frame


class ConnectedPeer:
    """See peers.Peer. connecting: a socket on its way to the receiver, which is ours from now on.

    frame: the first to go there, which knows who sends. extra, fds: what the transport says of itself beside its hello.
    """

    def __init__(
        self,
        connecting: socket.socket,
        site: Site,
        frame: OutgoingFrame,
        extra: bytes = b"",
        fds: tuple[int, ...] = (),
    ) -> None:
        epoch = frame.header.attempt.epoch_opposite(frame.destination.epoch)
        self._caller = Caller(site.secret, Hello(site.layout, epoch, frame.header.source_rank, extra))
        self._connection = Connection(connecting, MAX_ANSWER_BYTES)
        self._fds = fds
        self.has_greeted = False
        self.is_welcome = False

    @property
    def is_open(self) -> bool:
        return self.is_welcome

    @property
    def is_stalled(self) -> bool:
        return self._connection.is_stalled

    @property
    def takes_frames(self) -> bool:
        """Whether announce() may be called."""
        return self.is_welcome and not self._connection.is_stalled

    @property
    def pollable(self) -> int:
        return self._connection.fileno()

    def announce(self, sequence: int, frame: OutgoingFrame, slot: int = 0, payload: memoryview | None = None) -> None:
        """Send a frame's header, and what follows it at once. Raises OSError when the connection is gone."""
        announced = Announced(sequence, len(frame.payload), slot, encode_header(frame.header))
        self._connection.send(encode_frame(announced), payload)

    def answers(self) -> list[tuple[int, bytes]]:
        """Send more of what is on its way, and return what was said of which sequence number, without waiting.

        Raises RefusedError when receiver and sender do not belong together, OSError when the connection is gone,
        ValueError for what is no answer.
        """
        self._connection.flush()
        answers = []
        while (message := self._connection.receive()) is not None:
            if self.is_welcome:
                answers.append(decode_answer(message))
            else:
                self._greet(message)
        return answers

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        return frame

    def close(self) -> None:
        self._connection.close()

    def _greet(self, message: bytes) -> None:
        if self.has_greeted:
            self._caller.take_verdict(message)
            self.is_welcome = True
            return
        hello = self._caller.hello(message)
        self.has_greeted = True
        if self._fds:
            self._connection.send_fds(hello, [*self._fds])
        else:
            self._connection.send(hello)
