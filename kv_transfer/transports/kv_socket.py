"""What every ZMQ socket of the KV plane needs beside protocol.sockets. Used by all transports here."""

from typing import TypeVar

import zmq

from protocol.sockets import prepare

SocketT = TypeVar("SocketT", bound="zmq.Socket[bytes]")


def prepare_for_kv(socket: SocketT, max_bytes: int, queue: int) -> SocketT:
    """Prepare a socket without heartbeats: a busy receiver may leave frames unread for longer than these would wait.

    They would queue up behind those frames, and ZMQ would take the receiver for dead and lose what is on its way. Death
    is noticed by the control plane, and silence by the transports' own timeout.
    """
    prepare(socket, max_bytes, queue)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    return socket
