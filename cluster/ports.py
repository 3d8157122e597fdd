"""Whether the router's port can be had, and if not, who has it.

Asked by the checks before anything starts. Finding the owner reads /proc and needs the right to see that process.
"""

import errno
import socket
from collections.abc import Iterable
from pathlib import Path

from protocol.errors import ConfigError

_LISTEN = "0A"


def check_port(host: str, port: int) -> None:
    """Raise ConfigError when host:port cannot be bound; port 0 (any free one) always can."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"router.host {host} does not resolve: {error.strerror}") from None
    except UnicodeError:  # an empty or overlong part between two dots
        raise ConfigError(f"router.host {host!r} is not a host's name") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(_complaint(host, port, error)) from None


def _complaint(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        remedy = "stop it, or take another with --set router.port=0 (any free one)"
        return f"port {port} is in use{_owner(port)}; {remedy}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"router.host {host} is not an address of this machine"
    return f"router cannot listen on {host}:{port}: {error.strerror}"


def _owner(port: int) -> str:
    """Return " by pid P (command)", or nothing when that cannot be seen."""
    inodes = set(_listening_inodes(port))
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = str(link.readlink())
        except OSError:  # the process has ended, or is not ours to look into
            continue
        if target.startswith("socket:[") and target[8:-1] in inodes:
            pid = link.parts[2]
            return f" by pid {pid} ({_command(pid)})"
    return ""


def _listening_inodes(port: int) -> Iterable[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.exists():
            continue
        for row in table.read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                yield columns[9]


def _command(pid: str) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return "ended meanwhile"
    return words.decode(errors="replace").strip()[:80]
