"""Addresses of TCP listeners, "tcp://host:port", with brackets around an IPv6 host: made, and connected to."""

import errno
import socket

BACKLOG = 128


def listening_on(host: str) -> socket.socket:
    """Return a socket that listens on host alone, at a free port. Raises OSError when host cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family, backlog=BACKLOG)
    listening.setblocking(False)
    return listening


def address_of(listening: socket.socket) -> str:
    """Return where a listening socket is found."""
    host, port = listening.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def connecting_to(address: str) -> socket.socket:
    """Return a socket on its way to address. Raises ValueError for what is none, OSError if it cannot be."""
    host, separator, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not separator or not port.isdecimal():
        raise ValueError(f"not the address of a TCP listener: {address!r}")
    family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    connecting = socket.socket(family, kind, protocol)
    connecting.setblocking(False)
    failure = connecting.connect_ex(where)
    if failure not in (0, errno.EINPROGRESS):
        connecting.close()
        raise OSError(failure, f"cannot connect to {address}")
    return connecting
