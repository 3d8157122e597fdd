"""The sending side of shm and cuda_ipc: payloads are gathered straight into memory that the receiver reads.

One slab and one Unix socket per destination. A slab that was given up is never written again, so a receiver that is
still reading it reads what was sent. The thread is peer_loop.py's, queues and deadlines are peers.py's; the wire is
wire.py's. A packet is small and its socket never waits, so the main thread sends it where nothing is in its way.
"""

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from kv_transfer.frames import encode_header
from kv_transfer.handshake import greeting
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.offers import offered
from kv_transfer.transports.peer_loop import PeerLoop
from kv_transfer.transports.peers import fault_in
from kv_transfer.transports.slab import wire as slab_wire
from kv_transfer.transports.slab.host_slab import OwnSlab
from kv_transfer.transports.slab.wire import Reach
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled, Site

_GREETING = slab_wire.encode_answer(slab_wire.GREETING, "")


class Slabs:
    """One slab per destination: the main thread gathers into it, the sending thread sends from it."""

    def __init__(self, new_slab: Callable[[], OwnSlab]) -> None:
        self._new_slab = new_slab
        self._slabs: dict[Destination, OwnSlab] = {}
        self._lock = threading.Lock()

    def of(self, destination: Destination) -> OwnSlab:
        with self._lock:
            if destination not in self._slabs:
                self._slabs[destination] = self._new_slab()
            return self._slabs[destination]

    def drop(self, destination: Destination) -> None:
        with self._lock:
            slab = self._slabs.pop(destination, None)
        if slab:
            slab.close()

    def close(self) -> None:
        for destination in list(self._slabs):
            self.drop(destination)


class SlabPeer:
    """See peers.Peer. Raises OSError or ValueError when nobody listens at the destination."""

    def __init__(self, destination: Destination, reach: Reach, greeting: bytes, slabs: Slabs) -> None:
        self.waiting: deque[OutgoingFrame] = deque()
        self.unanswered: dict[bytes, OutgoingFrame] = {}
        self.is_stalled = False
        self._is_welcome = False
        self._destination = destination
        self._slabs = slabs
        self._slab = slabs.of(destination)
        self._num_sent = 0
        self._socket = slab_wire.new_socket()
        try:
            self._socket.connect(reach.name_at(offered(destination.address, reach.scheme)))
            self._say_hello(greeting)
        except (OSError, ValueError):
            self.close()
            raise

    def _say_hello(self, greeting: bytes) -> None:
        lent = self._slab.lend()
        hello = slab_wire.encode_hello(slab_wire.Hello(greeting, lent.description))
        try:
            socket.send_fds(self._socket, [hello], [lent.fd])
        finally:
            os.close(lent.fd)

    @property
    def pollable(self) -> int:
        return self._socket.fileno()

    def send_waiting(self) -> None:
        self.is_stalled = False
        try:
            while self.waiting and self._is_welcome:
                self.waiting[0] = self.waiting[0].sealed()
                frame = self._in_slab(self.waiting[0])
                if frame is None:
                    return
                self.waiting[0] = frame
                self._send(frame)
                self.waiting.popleft()
        except BlockingIOError:
            self.is_stalled = True

    def answers(self) -> list[Settled]:
        """Answers that mean nothing are passed over. Raises ConnectionRefusedError when the receiver says so."""
        settled = []
        while (data := self._receive()) is not None:
            if not data:
                raise ConnectionResetError("the receiver has closed the connection")
            sequence, fault = slab_wire.decode_answer(data)
            if sequence == _GREETING:
                self._be_welcome(fault)
            frame = self.unanswered.pop(sequence, None)
            if frame:
                self._slab.give_back(frame.payload)
                settled.append(Settled(frame, fault_in(fault)))
        return settled

    def _be_welcome(self, refusal: bytes) -> None:
        if refusal:
            raise ConnectionRefusedError(refusal.decode(errors="replace"))
        self._is_welcome = True

    def let_go(self, frame: OutgoingFrame) -> None:
        self._slab.give_back(frame.payload)

    def close(self) -> None:
        self._socket.close()
        self._slabs.drop(self._destination)

    def _receive(self) -> bytes | None:
        try:
            return self._socket.recv(slab_wire.MAX_PACKET_BYTES)
        except BlockingIOError:
            return None

    def _in_slab(self, frame: OutgoingFrame) -> OutgoingFrame | None:
        """Return the frame with its payload in the slab; None while a payload from elsewhere finds no free slot."""
        if self._slab.index_of(frame.payload) is not None:
            return frame
        room = self._slab.take(len(frame.payload))
        if room is None:
            return None
        room.copy_(frame.payload)
        if room.is_cuda:
            torch.cuda.current_stream(room.device).synchronize()
        return frame._replace(payload=room)

    def _send(self, frame: OutgoingFrame) -> None:
        sequence, slot = self._num_sent, self._slab.index_of(frame.payload)
        assert slot is not None
        packet = slab_wire.FramePacket(sequence, slot, len(frame.payload), encode_header(frame.header))
        self._socket.send(slab_wire.encode_frame(packet))
        self._num_sent += 1
        self.unanswered[slab_wire.encode_answer(sequence, "")] = frame


class SlabSender(PeerLoop):
    """A SendingTransport whose staging is shared with the receiver."""

    def __init__(self, reach: Reach, new_slab: Callable[[], OwnSlab], site: Site, settled: Mailbox[Settled]) -> None:
        self._slabs = Slabs(new_slab)
        open_peer = partial(SlabPeer, reach=reach, greeting=greeting(site.layout), slabs=self._slabs)
        super().__init__(reach.scheme, open_peer, site.timeout_s, settled)

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        # One slot stays for payloads from elsewhere: such a one may stand before frames that have all the others.
        return self._slabs.of(destination).take(num_bytes, spared=1)

    def send(self, frame: OutgoingFrame) -> None:
        if not self.send_at_once(frame):
            super().send(frame)

    def close(self) -> None:
        super().close()
        self._slabs.close()
