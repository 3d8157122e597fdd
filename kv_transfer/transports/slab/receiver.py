"""The receiving side of shm and cuda_ipc: one thread that checks payloads where they lie, in the senders' slabs.

A slot is staging: it belongs to this side from its frame's packet until the answer, which the main thread gives when it
has copied the payload (or the thread, when there is nothing to copy). A peer that breaks the rules, or runs as another
user, loses its connection and nothing else happens.
"""

import logging
import os
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from kv_transfer.handshake import refusal
from kv_transfer.mailbox import Mailbox
from kv_transfer.staging import landing_for
from kv_transfer.transports.intake import Intake
from kv_transfer.transports.slab import wire as slab_wire
from kv_transfer.transports.slab.host_slab import Lent, Slab
from kv_transfer.transports.slab.wire import Reach
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, Site
from protocol.identity import Epoch
from protocol.layout import KVLayout

_BACKLOG = 128
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_log = logging.getLogger(__name__)

OpenSlab = Callable[[Lent], Slab]
"""Raises ValueError or OSError for what cannot be opened."""


class _Connection:
    """One sender: its socket and its slab. answer() may be called from any thread, also after close()."""

    def __init__(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        self.socket = accepted
        self.slab: Slab | None = None

    def greet(self, data: bytes, fds: list[int], layout: KVLayout, open_slab: OpenSlab) -> None:
        """Take the sender's slab. Raises ConnectionRefusedError when it may not send, else ValueError or OSError."""
        try:
            hello = slab_wire.decode_hello(data)
            if len(fds) != 1:
                raise ValueError(f"a hello with {len(fds)} descriptors")
            reason = refusal(layout, hello.greeting) or self._open(Lent(hello.slab, fds[0]), open_slab)
            self.answer(slab_wire.GREETING, reason)
            if reason:
                raise ConnectionRefusedError(reason)
        finally:
            for fd in fds:
                os.close(fd)

    def _open(self, lent: Lent, open_slab: OpenSlab) -> str:
        try:
            self.slab = open_slab(lent)
        except OSError as error:
            return str(error)
        return ""

    def answer(self, sequence: int, fault: str) -> None:
        try:
            self.socket.send(slab_wire.encode_answer(sequence, fault))
        except OSError:  # the sender is gone, or does not read its answers: it will hear of nothing any more
            self.hang_up()

    def hang_up(self) -> None:
        """Let both ends see the end of the connection; close() is the thread's."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class SlabReceiver:
    """A ReceivingTransport; reached by senders on this host only. Listens on no network, never waits for a peer."""

    def __init__(self, reach: Reach, open_slab: OpenSlab, site: Site, arrivals: Mailbox[Arrival]) -> None:
        self.arrivals = arrivals
        self.counters: dict[str, int] = dict.fromkeys(RECEIVING_FAULTS, 0)
        self._layout = site.layout
        self._open_slab = open_slab
        self._intake = Intake(arrivals, self.counters, landing_for(site.device))
        self._listener = slab_wire.new_socket()
        self._listener.bind(b"\0tandem-kv-" + secrets.token_hex(8).encode())
        self._listener.listen(_BACKLOG)
        self.address = reach.address_of(self._listener)
        self._stop: Mailbox[None] = Mailbox(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="kv-receiver", daemon=True)
        self._thread.start()

    def close_peer(self, epoch: Epoch) -> None:
        """Nothing to do: a dead sender's connection has ended, and what it left names an attempt that is over."""

    def close(self) -> None:
        self.arrivals.close()
        self._stop.ring()
        self._thread.join()
        self._stop.close()

    # --- everything below runs on the receiver's own thread -----------------------------------------------------------

    def _run(self) -> None:
        while True:
            ready = [key for key, _ in self._selector.select()]
            if any(key.fileobj is self._stop for key in ready):
                break
            for key in ready:
                self._serve(key.data)
        for key in list(self._selector.get_map().values()):
            if key.data:
                key.data.socket.close()
        self._selector.close()
        self._listener.close()

    def _serve(self, connection: _Connection | None) -> None:
        """Accept a sender, or take one packet of one that is there."""
        if connection is None:
            self._accept()
            return
        try:
            self._receive(connection)
        except BlockingIOError:
            pass
        except (OSError, ValueError) as error:
            if isinstance(error, ConnectionRefusedError):
                self.counters["refused_peer"] += 1
            elif not isinstance(error, ConnectionError):
                self.counters["bad_message"] += 1
            self._close(connection)
        except Exception:
            self.counters["internal_error"] += 1
            _log.exception("a connection to %s was closed", self.address)
            self._close(connection)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:  # it left before its turn came
            return
        credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        if _PEER_CREDENTIALS.unpack(credentials)[1] != os.getuid():
            self.counters["bad_message"] += 1
            accepted.close()
            return
        self._selector.register(accepted, selectors.EVENT_READ, _Connection(accepted))

    def _close(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _receive(self, connection: _Connection) -> None:
        if connection.slab is None:
            data, fds, _, _ = socket.recv_fds(connection.socket, slab_wire.MAX_PACKET_BYTES, 4)
            if not data and not fds:
                raise ConnectionResetError
            connection.greet(data, fds, self._layout, self._open_slab)
            return
        data = connection.socket.recv(slab_wire.MAX_PACKET_BYTES)
        if not data:
            raise ConnectionResetError
        packet = slab_wire.decode_frame(data)
        payload = connection.slab.slot(packet.slot, packet.num_bytes)
        fault = self._intake.accept(packet.header, payload, partial(connection.answer, packet.sequence, ""))
        if fault:
            connection.answer(packet.sequence, fault)
