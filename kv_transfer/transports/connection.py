"""One connection between two ranks: messages, and raw bytes after them, over a stream socket that never waits.

Used by both sides of all transports, over TCP and over Unix sockets. On the wire a message is its length and as many
bytes. Memory is bounded by one message that arrives and what its owner sends: whoever sends while is_stalled says so
knows why. Knows nothing of what is said.
"""

import os
import socket
import struct
import threading
from collections import deque

MAX_FDS = 4
_READ_BYTES = 16 << 10
_length = struct.Struct("<I")

_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
"""Seconds, seconds, times: an end whose machine is gone is noticed by TCP although nothing is sent."""


class Connection:
    """Over a connected (or connecting) socket, which is ours from now on. send() and close() are any thread's."""

    def __init__(self, connected: socket.socket, max_bytes: int) -> None:
        connected.setblocking(False)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self.max_bytes = max_bytes
        self._socket = connected
        self._lock = threading.Lock()  # of what is not sent, and of the socket's end
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    @property
    def is_stalled(self) -> bool:
        """Whether the connection took less than it was given; flush() gives it the rest."""
        return bool(self._unsent)

    def send(self, message: bytes, payload: memoryview | None = None) -> None:
        """Send a message and the raw bytes that follow it, which stay as they are until they have left.

        Raises OSError when the connection is gone.
        """
        with self._lock:
            self._unsent.append(memoryview(_length.pack(len(message)) + message))
            if payload is not None:
                self._unsent.append(payload)
            self._flush()

    def send_fds(self, message: bytes, fds: list[int]) -> None:
        """Send a short message with descriptors beside it, as the first thing that is sent. Raises OSError."""
        data = _length.pack(len(message)) + message
        if socket.send_fds(self._socket, [data], fds) != len(data):
            raise ConnectionError("a message did not fit into an empty socket")

    def flush(self) -> None:
        """Send more of what is not sent yet. Raises OSError when the connection is gone."""
        if self._unsent:
            with self._lock:
                self._flush()

    def answer(self, message: bytes) -> None:
        """Send a short message to somebody who should be reading; one who is not has lost the connection."""
        try:
            self.send(message)
        except OSError:
            return  # the end of the connection is noticed by whoever reads it
        if self._unsent:
            self.hang_up()

    def receive(self) -> bytes | None:
        """Return the next message, None while it has not come whole.

        Raises ConnectionResetError at the connection's end, OSError, ValueError for a message of more than max_bytes.
        """
        while (message := self._next()) is None:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return None
            self._take(data)
        return message

    def receive_first(self) -> tuple[bytes | None, list[int]]:
        """As receive, of somebody unknown; with the descriptors that came beside it, which are the caller's."""
        if self._socket.family != socket.AF_UNIX:
            return self.receive(), []
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _READ_BYTES, MAX_FDS)
        except BlockingIOError:
            return None, []
        try:
            self._take(data)
            return self._next(), fds
        except (OSError, ValueError):
            for fd in fds:
                os.close(fd)
            raise

    def receive_into(self, target: memoryview) -> int:
        """Put raw bytes that have come into the beginning of target; return how many.

        When they are fewer than target takes, no more were there. Raises ConnectionResetError at the connection's end,
        and OSError.
        """
        num_bytes = min(len(self._received), len(target))
        if num_bytes:
            target[:num_bytes] = self._received[:num_bytes]
            del self._received[:num_bytes]
        if num_bytes == len(target):
            return num_bytes
        try:
            num_read = self._socket.recv_into(target[num_bytes:])
        except BlockingIOError:
            return num_bytes
        if not num_read:
            raise ConnectionResetError("the other end has closed the connection")
        return num_bytes + num_read

    def hang_up(self) -> None:
        """Let both ends see the end of the connection, from any thread; close() is the owner's."""
        with self._lock:
            self._unsent.clear()
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it has ended already

    def close(self) -> None:
        with self._lock:
            self._unsent.clear()
            self._socket.close()

    def _flush(self) -> None:
        try:
            if self._unsent:
                self._drop(self._socket.sendmsg([*self._unsent]))  # once: what it does not take, it has no room for
        except BlockingIOError:
            return

    def _drop(self, num_sent: int) -> None:
        while num_sent:
            first = self._unsent.popleft()
            if num_sent < len(first):
                self._unsent.appendleft(first[num_sent:])
                return
            num_sent -= len(first)

    def _take(self, data: bytes) -> None:
        if not data:
            raise ConnectionResetError("the other end has closed the connection")
        self._received += data

    def _next(self) -> bytes | None:
        if len(self._received) < _length.size:
            return None
        (num_bytes,) = _length.unpack_from(self._received)
        if num_bytes > self.max_bytes:
            raise ValueError(f"a message of {num_bytes} bytes; at most {self.max_bytes} are accepted here")
        end = _length.size + num_bytes
        if len(self._received) < end:
            return None
        message = bytes(self._received[_length.size : end])
        del self._received[:end]
        return message
