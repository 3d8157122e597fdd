"""The receiving side of all transports: listens, lets nobody in who does not greet as one of this cluster, and serves.

One thread accepts, greets and reads for all senders. Of whom it does not know yet it reads one message of bounded
length and nothing else, has only so many of them at a time, and waits for none for long; see handshake.py. Whoever is
welcome gets a Session of the transport's own, which takes its frames. A sender that breaks the rules loses its
connection and nothing else happens.
"""

import logging
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from kv_transfer import threads
from kv_transfer.frames import FrameError
from kv_transfer.handshake import MAX_HELLO_BYTES, Doorkeeper, Hello, RefusedError, StrangerError
from kv_transfer.mailbox import Mailbox
from kv_transfer.staging import landing_for
from kv_transfer.transports.connection import Connection
from kv_transfer.transports.intake import Intake
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, ReceivingFault, Site
from kv_transfer.transports.wire import MAX_MESSAGE_BYTES
from protocol.errors import WireError
from protocol.identity import Epoch

MAX_STRANGERS = 64
"""Connections that have not greeted yet; one more, and the oldest is closed."""

GREETING_S = 2.0
"""How long each of them has for its hello."""

_ACCEPTED_AT_ONCE = 16
_SAID_EVERY_S = 5.0
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_log = logging.getLogger(__name__)


class Session(Protocol):
    """What a transport does for one sender that is welcome, on the listener's thread."""

    def serve(self) -> None:
        """Take what has come over the connection, without waiting for more.

        Raises OSError at the connection's end, ValueError or WireError for what is against the rules.
        """

    def close(self) -> None:
        """The connection has ended; answers that are still given go nowhere."""


OpenSession = Callable[[Connection, Hello, list[int], Intake], Session]
"""Takes the descriptors that came with the hello too, which are closed afterwards.

Raises RefusedError for a sender that cannot be served, ValueError for what is against the rules.
"""


class _Stranger(NamedTuple):
    """A connection that has not greeted yet."""

    connection: Connection
    door: Doorkeeper
    came_at: float
    name: str


class _Member(NamedTuple):
    """A sender that is welcome."""

    connection: Connection
    session: Session
    hello: Hello


class Listener:
    """A ReceivingTransport. listening: a bound socket that never waits, which is the listener's from now on."""

    def __init__(
        self,
        listening: socket.socket,
        address: str,
        site: Site,
        arrivals: Mailbox[Arrival],
        open_session: OpenSession,
    ) -> None:
        self.address = address
        self.arrivals = arrivals
        self.counters: dict[str, int] = dict.fromkeys(RECEIVING_FAULTS, 0)
        self._listening = listening
        self._site = site
        self._open_session = open_session
        self._intake = Intake(arrivals, self.counters, landing_for(site.device))
        self._strangers: list[_Stranger] = []
        self._members: dict[tuple[Epoch, int], _Member] = {}
        self._said_at = -_SAID_EVERY_S
        self._is_closing = False
        self._commands: Mailbox[Callable[[], None]] = Mailbox(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._commands, selectors.EVENT_READ, self._obey)
        self._selector.register(listening, selectors.EVENT_READ, self._accept)
        self._thread = threads.start("kv-listener", self._run)

    def close_peer(self, epoch: Epoch) -> None:
        self._commands.put(partial(self._dismiss_epoch, epoch))

    def close(self) -> None:
        self.arrivals.close()
        self._is_closing = True
        self._commands.ring()
        if threads.has_ended(self._thread):
            self._commands.close()

    # --- everything below runs on the listener's own thread -----------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(GREETING_S / 4 if self._strangers else None):
                key.data()
            self._close_slow_strangers()
        for member in list(self._members.values()):
            self._dismiss(member)
        for stranger in list(self._strangers):
            self._close_stranger(stranger)
        self._selector.close()
        self._listening.close()

    def _obey(self) -> None:
        for command in self._commands.take(1):
            command()

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, peer = self._listening.accept()
            except OSError:  # nobody any more, or who left before its turn came
                return
            self._meet(accepted, str(peer))

    def _meet(self, accepted: socket.socket, name: str) -> None:
        if len(self._strangers) >= MAX_STRANGERS:
            self._turn_away(self._strangers[0], "more than enough others wait to greet")
        stranger = _Stranger(
            Connection(accepted, MAX_HELLO_BYTES),
            Doorkeeper(self._site.secret, self._site.layout),
            time.monotonic(),
            name,
        )
        self._strangers.append(stranger)
        self._selector.register(accepted, selectors.EVENT_READ, partial(self._greet, stranger))
        if not _is_same_user(accepted):
            self._turn_away(stranger, "a process of another user")
            return
        stranger.connection.answer(stranger.door.challenge)

    def _greet(self, stranger: _Stranger) -> None:
        """Read a hello, and let its sender in or not."""
        if stranger.connection.is_closed:
            return  # a moment ago, in the same round
        try:
            message, fds = stranger.connection.receive_first()
            try:
                if message is not None:
                    self._judge(stranger, message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        except (ValueError, StrangerError) as error:
            self._turn_away(stranger, str(error))
        except OSError:
            self._close_stranger(stranger)
        except Exception:
            self._stumble(stranger.name)
            self._close_stranger(stranger)

    def _judge(self, stranger: _Stranger, message: bytes, fds: list[int]) -> None:
        connection, door = stranger.connection, stranger.door
        hello, refusal = door.judge(message)
        if hello and not refusal:
            try:
                self._welcome(stranger, hello, fds)
                return
            except RefusedError as error:
                refusal = str(error)
            except ValueError as error:
                refusal = str(error)
                self.counters["bad_message"] += 1
        self.counters["refused_peer"] += 1
        self._say(f"a sender at {stranger.name} is refused: {refusal}")
        connection.answer(door.verdict(refusal))
        self._close_stranger(stranger)

    def _welcome(self, stranger: _Stranger, hello: Hello, fds: list[int]) -> None:
        """Serve it from now on, in place of any earlier connection of the same rank in the same life."""
        connection = stranger.connection
        connection.max_bytes = MAX_MESSAGE_BYTES
        member = _Member(connection, self._open_session(connection, hello, fds, self._intake), hello)
        earlier = self._members.get(_origin(hello))
        if earlier:
            self._dismiss(earlier)
        self._strangers.remove(stranger)
        self._members[_origin(hello)] = member
        self._selector.modify(connection, selectors.EVENT_READ, partial(self._serve, member))
        connection.answer(stranger.door.verdict(""))

    def _serve(self, member: _Member) -> None:
        if member.connection.is_closed:
            return
        try:
            member.session.serve()
        except ConnectionError:
            self._dismiss(member)
        except (OSError, ValueError, WireError) as error:
            self.counters[error.fault if isinstance(error, FrameError) else "bad_message"] += 1
            self._say(f"rank {member.hello.rank} has lost its connection: {error}")
            self._dismiss(member)
        except Exception:
            self._stumble(f"rank {member.hello.rank}")
            self._dismiss(member)

    def _dismiss_epoch(self, epoch: Epoch) -> None:
        for member in [member for member in self._members.values() if member.hello.epoch == epoch]:
            self._dismiss(member)

    def _dismiss(self, member: _Member) -> None:
        self._selector.unregister(member.connection)
        member.connection.close()
        member.session.close()
        del self._members[_origin(member.hello)]

    def _close_slow_strangers(self) -> None:
        now_s = time.monotonic()
        while self._strangers and now_s - self._strangers[0].came_at > GREETING_S:
            self._turn_away(self._strangers[0], f"no hello within {GREETING_S:g} s")

    def _turn_away(self, stranger: _Stranger, why: str) -> None:
        fault: ReceivingFault = "stranger"
        self.counters[fault] += 1
        self._say(f"a stranger at {stranger.name} is turned away: {why}")
        stranger.connection.answer(stranger.door.verdict(why))  # one of ours with another secret should not ask again
        self._close_stranger(stranger)

    def _close_stranger(self, stranger: _Stranger) -> None:
        self._selector.unregister(stranger.connection)
        stranger.connection.close()
        self._strangers.remove(stranger)

    def _stumble(self, over: str) -> None:
        self.counters["internal_error"] += 1
        _log.exception("the connection of %s to %s is closed", over, self.address)

    def _say(self, text: str) -> None:
        """Log, but not as often as somebody else likes."""
        now_s = time.monotonic()
        if now_s - self._said_at >= _SAID_EVERY_S:
            self._said_at = now_s
            _log.warning("%s: %s", self.address, text)


def _origin(hello: Hello) -> tuple[Epoch, int]:
    return hello.epoch, hello.rank


def _is_same_user(accepted: socket.socket) -> bool:
    """Whether a process of this host runs as this user; others come over the network, and are not asked."""
    if accepted.family != socket.AF_UNIX:
        return True
    credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return bool(_PEER_CREDENTIALS.unpack(credentials)[1] == os.getuid())
