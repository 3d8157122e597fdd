"""How ZMQ sockets are made here: bounded queues, heartbeats, size limits, the configured address only.

Used by the router's and the workers' control plane and by kv_transfer. Knows nothing of what is sent.
"""

from typing import TypeVar

import zmq

from protocol.codec import MAX_MESSAGE_BYTES

HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2000
HANDSHAKE_MS = 2000
CONNECT_MS = 2000
"""Then whoever connects begins anew. By itself TCP asks again after ever longer pauses, up to a minute, and so
learns that late that the network is back."""
BACKLOG = 4096
"""Of those who connect at once, more than so many try again a second later; ZMQ's own number is 100."""

SocketT = TypeVar("SocketT", bound="zmq.Socket[bytes]")


def prepare(socket: SocketT, max_bytes: int = MAX_MESSAGE_BYTES, queue: int = 1000) -> SocketT:
    """Set what every socket of ours needs: nothing lingers, nothing grows without bound, a dead peer is noticed."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    if socket.type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return socket


def bind(socket: "zmq.Socket[bytes]", host: str) -> str:
    """Bind to a free port of host and return the address, "tcp://host:port", with brackets around an IPv6 host."""
    address = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
    _suit(socket, address)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    return f"{address}:{socket.bind_to_random_port(address)}"


def connect(socket: "zmq.Socket[bytes]", address: str) -> None:
    """Connect to what bind returned. Raise zmq.ZMQError for an address that is none."""
    _suit(socket, address)
    socket.connect(address)


def _suit(socket: "zmq.Socket[bytes]", address: str) -> None:
    """Not for all sockets: where a machine has no IPv6, a socket that is made for it may not be bound at all."""
    socket.setsockopt(zmq.IPV6, address.startswith("tcp://["))
