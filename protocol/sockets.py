"""How ZMQ sockets are made here: size limits, bounded queues, members only, heartbeats, the configured address only.

prepare is for kv_transfer, prepare_for_members for the control plane and for orders within a group. Nothing here knows
what is sent. Why strangers are kept out in this way, and what it costs: docs/decisions/0016-who-may-join.md.
"""

from typing import TypeVar

import zmq
from zmq.utils import z85

from protocol.codec import MAX_MESSAGE_BYTES, MAX_REPORT_BYTES

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
    """Set what every socket of ours needs: nothing lingers, and nothing grows without bound."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if socket.type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return socket


def prepare_for_members(socket: SocketT, key: bytes, queue: int = 1000) -> SocketT:
    """As prepare, and nothing is received of whoever does not have the same key, and a dead peer is noticed.

    A ROUTER is the router's or a leader's, and takes no more than ranks have to say. key: 32 bytes. queue bounds what
    waits to be sent. What has come waits for its reader without bound, for a socket with heartbeats must never stop
    reading: its peers' answers would be among what it does not read, and ZMQ aborts the process when a connection
    breaks on which it has stopped.
    """
    prepare(socket, MAX_REPORT_BYTES if socket.type == zmq.ROUTER else MAX_MESSAGE_BYTES, queue)
    require_key(socket, key)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return socket


def require_key(socket: "zmq.Socket[bytes]", key: bytes) -> None:
    """Let the socket talk to those only who have the same 32 bytes. ROUTER and PULL ask for them, others show them.

    They are the private key of a CURVE server. Whoever does not know its public key, which is told to nobody, cannot
    make the first message of CURVE's handshake, and is not read beyond that; nor could he answer one.
    """
    server = z85.encode(key)
    if socket.type in (zmq.ROUTER, zmq.PULL):
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, server)
        return
    public, private = zmq.curve_keypair()
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, private)
    socket.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_public(server))


def has_encryption() -> bool:
    """Whether this machine's ZMQ was built with what require_key needs."""
    return bool(zmq.has("curve"))


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
