"""A worker's line to the router: one DEALER socket for this life of the process, messages in, messages out.

Used by every rank. What does not parse, or is meant for an earlier life, is dropped and counted; nothing that arrives
can end the loop that reads here. Only a router of another version ends a life, and only before it has begun. The socket
is a ControlSocket, or whatever a simulator gives instead.
"""

import time
from typing import Protocol

import zmq

from protocol.codec import decode, encode
from protocol.errors import ConfigError, TandemError, VersionError, WireError
from protocol.identity import Epoch
from protocol.messages import MAX_POSITIONS, AnyMessage, Fence, Stop, Tokens, TokenUpdate, Welcome, WorkerInfo
from protocol.secret import Secret
from protocol.sockets import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, connect, prepare_for_members

WELCOME_TIMEOUT_S = 60.0
RECONNECT_MS = HEARTBEAT_TIMEOUT_MS + 2 * HEARTBEAT_MS
"""The router needs at most a heartbeat's timeout and a few of its ticks to find out that a connection is gone."""
ROUTER_SILENCE_MS = 10_000
"""What was sent and is not acknowledged for so long ends the connection. A router whose process stands still (stopped,
moved, its disk full) has a kernel that acknowledges until its buffers are full: it loses nobody in that time."""

_MAX_MESSAGES = 100_000


class Fenced(TandemError):
    """The router ended this life, or cannot be reached: the process ends and Ray starts the next one."""


class Stopped(TandemError):
    """The router said that nothing more will come: the process ends cleanly."""


class ControlWire(Protocol):
    """Bytes to the router and back, in order."""

    def send(self, data: bytes) -> None:
        """Send without waiting. Raise Fenced when the router takes nothing any more."""

    def receive(self) -> bytes | None:
        """Return the next message, None when none has come."""

    def wait(self, timeout_s: float) -> None:
        """Return when a message has come, or after timeout_s."""


class ControlSocket:
    """The ControlWire of a real worker. Its identity carries the epoch: what was queued for another life stays there.

    What was under way when a connection is lost is lost with it, and nobody could say what it was. So this end waits
    with connecting again until the router has found out: by then this life is over there, and hears so. The router
    notices by heartbeats that a worker has gone. This end sends none, for a router that stands still is not gone.
    """

    def __init__(self, address: str, worker: WorkerInfo, secret: Secret) -> None:
        self._context = zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        self.pollable = prepare_for_members(socket, secret.key("control"), queue=_MAX_MESSAGES)
        identity = f"{worker.role}-{worker.group}-{worker.rank}-{worker.epoch:x}"
        self.pollable.setsockopt(zmq.IDENTITY, identity.encode())
        self.pollable.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self.pollable.setsockopt(zmq.HEARTBEAT_IVL, 0)
        self.pollable.setsockopt(zmq.TCP_MAXRT, ROUTER_SILENCE_MS)
        connect(self.pollable, address)

    def send(self, data: bytes) -> None:
        try:
            self.pollable.send(data, zmq.NOBLOCK)
        except zmq.Again:
            raise Fenced("the router takes no more messages") from None

    def receive(self) -> bytes | None:
        return self.pollable.recv() if self.pollable.poll(0) else None

    def wait(self, timeout_s: float) -> None:
        self.pollable.poll(int(timeout_s * 1000))

    def close(self) -> None:
        """Send what is queued and let go; at most a second goes by."""
        self.pollable.close(linger=1000)
        self._context.term()


class ControlLink:
    """engine.role.Outlet towards the router, and the way back."""

    def __init__(self, wire: ControlWire, epoch: Epoch) -> None:
        self._wire = wire
        self._epoch = epoch
        self._outgoing: list[AnyMessage] = []
        self._updates: list[TokenUpdate] = []
        self._misunderstood: VersionError | None = None
        self.counters: dict[str, int] = {"unparsed_messages": 0, "stale_messages": 0}

    def send(self, message: AnyMessage) -> None:
        """Queue a message; flush sends it."""
        self._close_updates()
        self._outgoing.append(message)

    def emit(self, update: TokenUpdate) -> None:
        """Queue a token; neighbours in the queue travel together."""
        self._updates.append(update)
        if len(self._updates) == MAX_POSITIONS:
            self._close_updates()

    def flush(self) -> None:
        """Send everything that is queued, in order. Raise Fenced when the router takes nothing any more."""
        self._close_updates()
        outgoing, self._outgoing = self._outgoing, []
        for message in outgoing:
            self._wire.send(encode(message, self._epoch))

    def receive(self) -> list[AnyMessage]:
        """Return what has come since the last call, without waiting. Raise Fenced or Stopped when told to end."""
        messages: list[AnyMessage] = []
        while (data := self._wire.receive()) is not None:
            message = self._parse(data)
            if isinstance(message, Fence):
                raise Fenced(message.reason)
            if isinstance(message, Stop):
                raise Stopped("the router said stop")
            if message is not None:
                messages.append(message)
        return messages

    def await_welcome(self) -> Welcome:
        """Return the router's answer to Join. Raise Fenced when none comes in time, ConfigError for another version."""
        deadline = time.monotonic() + WELCOME_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            self._wire.wait(left)
            for message in self.receive():
                if isinstance(message, Welcome):
                    return message
            if self._misunderstood is not None:
                raise ConfigError(_differs(self._misunderstood))
        raise Fenced(f"no welcome from the router within {WELCOME_TIMEOUT_S:g} s")

    def _close_updates(self) -> None:
        if self._updates:
            self._outgoing.append(Tokens(tuple(self._updates)))
            self._updates = []

    def _parse(self, data: bytes) -> AnyMessage | None:
        try:
            envelope = decode(data)
        except WireError as error:
            self.counters["unparsed_messages"] += 1
            if isinstance(error, VersionError):
                self._misunderstood = error
            return None
        if envelope.receiver_epoch not in (0, self._epoch):
            self.counters["stale_messages"] += 1
            return None
        return envelope.message


def _differs(error: VersionError) -> str:
    return (
        f"the router speaks version {error.theirs} of the control protocol, this worker version {error.ours}: "
        f"Tandem must be the same on this machine as where the router runs"
    )
