"""Where the two ends of shm and cuda_ipc find one another: Unix sockets without a name in any file system, of one host.

Used by sender.py, receiver.py and whoever chooses a transport.
"""

import secrets
import socket
from typing import NamedTuple

_BACKLOG = 128


class Reach(NamedTuple):
    """One end of a transport through shared memory: its name, where its own memory is, and which places it reaches."""

    scheme: str
    place: str
    reachable: frozenset[str]

    def address_of(self, listening: socket.socket) -> str:
        """Return where a listening socket of this end is found: its place and its name."""
        return f"{self.scheme}://{self.place}/{listening.getsockname()[1:].decode()}"

    def name_at(self, address: str) -> bytes:
        """Return the name to connect to. Raises ValueError for an address that this end cannot reach."""
        place, _, name = address.removeprefix(f"{self.scheme}://").rpartition("/")
        if not address.startswith(f"{self.scheme}://") or not name:
            raise ValueError(f"not an address of the {self.scheme} transport")
        if not place or place not in self.reachable:
            where = f"{place}, which {self.scheme} does not reach from {self.place}"
            raise ValueError(f"the receiver is on another host or GPU, {where}")
        return b"\0" + name.encode()

    def reaches(self, address: str) -> bool:
        """Return whether this end can connect to that address."""
        try:
            return bool(self.name_at(address))
        except ValueError:
            return False


def listening_here() -> socket.socket:
    """Return a socket that listens under a name of its own and never waits."""
    listening = _new_socket()
    listening.bind(b"\0tandem-kv-" + secrets.token_hex(8).encode())
    listening.listen(_BACKLOG)
    return listening


def connected_to(name: bytes) -> socket.socket:
    """Return a socket that is connected to that name and never waits. Raises OSError when nobody listens there."""
    connected = _new_socket()
    try:
        connected.connect(name)
    except OSError:
        connected.close()
        raise
    return connected


def _new_socket() -> socket.socket:
    unconnected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unconnected.setblocking(False)
    return unconnected
