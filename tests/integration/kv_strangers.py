"""Whoever else may connect to a receiver of KV: strangers that send anything, and members that break the rules."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kv_transfer.handshake import Caller, Hello
from kv_transfer.transports.offers import offers_in
from kv_transfer.transports.slab.factories import host_reach
from protocol.layout import KVLayout
from tests.integration.kv_groups import SECRET

_length = struct.Struct("<I")


def sockets_at(address: str) -> list[str]:
    """Every address that an address of a receiver offers."""
    return list(offers_in(address).values()) or [address]


@contextmanager
def connected_to(address: str) -> Iterator[socket.socket]:
    """A socket that waits, connected to a receiver's address."""
    with _connected(sockets_at(address)[0]) as peer:
        peer.settimeout(5)
        yield peer


def _connected(address: str) -> socket.socket:
    if address.startswith("tcp://"):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        return socket.create_connection((host, int(port)), 5)
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(host_reach().name_at(address))
    return peer


def message(body: bytes) -> bytes:
    return _length.pack(len(body)) + body


def said(peer: socket.socket) -> bytes:
    """The next message, b"" when the connection has ended."""
    with suppress(ConnectionResetError):
        length = peer.recv(_length.size, socket.MSG_WAITALL)
        return peer.recv(_length.unpack(length)[0], socket.MSG_WAITALL) if length else b""
    return b""


def greet(
    peer: socket.socket,
    layout: KVLayout,
    extra: bytes = b"",
    fds: tuple[int, ...] = (),
    rank: int = 0,
    secret: bytes = SECRET,
) -> Caller:
    """Say hello; the verdict is what comes next."""
    caller = Caller(secret, Hello(layout, 5, rank, extra))
    hello = message(caller.hello(said(peer)))
    if fds:
        socket.send_fds(peer, [hello], [*fds])
    else:
        peer.sendall(hello)
    return caller
