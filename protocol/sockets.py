"""How ZMQ sockets are made here: bounded queues, heartbeats, size limits, the configured address only.

Used by the router's and the workers' control plane and by kv_transfer. Knows nothing of what is sent.
"""

from typing import TypeVar

import zmq

from protocol.codec import MAX_MESSAGE_BYTES

HEARTBEAT_MS = 500
HEARTBEAT_TIMEOUT_MS = 2000
HANDSHAKE_MS = 2000
BACKLOG = 4096
"""Of those who connect at once, more than so many try again a second later; ZMQ's own number is 100."""

SocketT = TypeVar("SocketT", bound="zmq.Socket[bytes]")


def prepare(socket: SocketT, max_bytes: int = MAX_MESSAGE_BYTES, queue: int = 1000) -> SocketT:
    """Set what every socket of ours needs: nothing lingers, nothing grows without bound, a dead peer is noticed."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    if socket.type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return socket


def bind(socket: "zmq.Socket[bytes]", host: str) -> str:
    """Bind to a free port of host and return the address, "tcp://host:port"."""
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    port = socket.bind_to_random_port(f"tcp://{host}")
    return f"tcp://{host}:{port}"
