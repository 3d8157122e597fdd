"""Several hosts on one machine: each has a network and a name of its own, and a cable to a switch that can be pulled.

Made of Linux namespaces, which takes root and iproute2. Files and processes are this machine's.
"""

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_NAMESPACES = {"net": 0x40000000, "uts": 0x04000000}
_libc = ctypes.CDLL(None, use_errno=True)


class Host:
    """Raises OSError where this user may not make one, or where there is no `ip`. It is gone once it is closed."""

    def __init__(self, name: str, address: str = "") -> None:
        self.name = name
        self.address = address
        before = _here()
        _check(_libc.unshare(sum(_NAMESPACES.values())))
        self._files = _here()
        try:
            socket.sethostname(name)
            ip("link", "set", "lo", "up")
        finally:
            _enter(before)
            _close(before)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and whatever it starts, is on this host meanwhile."""
        before = _here()
        _enter(self._files)
        try:
            yield
        finally:
            _enter(before)
            _close(before)

    @property
    def network(self) -> str:
        """What `ip` takes for this host's network."""
        return f"/proc/{os.getpid()}/fd/{self._files['net']}"

    def close(self) -> None:
        _close(self._files)


class Network:
    """Hosts 10.77.0.1, 10.77.0.2 and so on, named host1, host2 and so on."""

    def __init__(self, num_hosts: int) -> None:
        self._cleanup = ExitStack()
        self._switch = self._host("switch")
        self.hosts = [self._host(f"host{number}", f"10.77.0.{number}") for number in range(1, num_hosts + 1)]
        with self._switch.entered():
            ip("link", "add", "bridge", "type", "bridge")
            ip("link", "set", "bridge", "up")
        for host in self.hosts:
            self._connect(host)

    def pull(self, host: Host) -> None:
        """Pull the cable between this host and the switch."""
        with self._switch.entered():
            ip("link", "set", host.name, "down")

    def plug(self, host: Host) -> None:
        with self._switch.entered():
            ip("link", "set", host.name, "up")

    def close(self) -> None:
        self._cleanup.close()

    def _host(self, name: str, address: str = "") -> Host:
        host = Host(name, address)
        self._cleanup.callback(host.close)
        return host

    def _connect(self, host: Host) -> None:
        with self._switch.entered():
            ip("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.network)
            ip("link", "set", host.name, "master", "bridge", "up")
        with host.entered():
            ip("address", "add", f"{host.address}/24", "dev", "eth0")
            ip("link", "set", "eth0", "up")


def ip(*arguments: str) -> None:
    """Run iproute2. Raise OSError when there is none, or when it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _here() -> dict[str, int]:
    """Return open files of this thread's namespaces."""
    return {kind: os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _NAMESPACES}


def _enter(files: dict[str, int]) -> None:
    for kind, file in files.items():
        _check(_libc.setns(file, _NAMESPACES[kind]))


def _close(files: dict[str, int]) -> None:
    for file in files.values():
        os.close(file)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
