"""The sending side of the zmq transport: one DEALER per destination.

Payloads are sent from where they lie. The thread is peer_loop.py's, queues and deadlines are peers.py's; answers: see
receiver.py.
"""

from collections import deque
from functools import partial

import torch
import zmq

from kv_transfer.frames import encode_header
from kv_transfer.handshake import greeting
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.kv_socket import prepare_for_kv
from kv_transfer.transports.offers import offered
from kv_transfer.transports.peer_loop import PeerLoop
from kv_transfer.transports.peers import fault_in
from kv_transfer.transports.torch.buffers import Buffers, host_buffers
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled, Site
from kv_transfer.transports.zmq.receiver import GREETING
from protocol.sockets import connect

QUEUED_FRAMES = 8
"""Frames per destination that ZMQ may hold after the thread has let go of them; they can no longer be dropped."""

_MAX_ANSWER_BYTES = 1024


class ZmqPeer:
    """See peers.Peer."""

    def __init__(self, destination: Destination, greeting: bytes, buffers: Buffers) -> None:
        self.waiting: deque[OutgoingFrame] = deque()
        self.unanswered: dict[bytes, OutgoingFrame] = {}
        self.is_stalled = False
        self._buffers = buffers
        self._greeting: list[bytes] | None = [GREETING, greeting]
        self._is_welcome = False
        self._num_sent = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.pollable = prepare_for_kv(self._context.socket(zmq.DEALER), _MAX_ANSWER_BYTES, QUEUED_FRAMES)
        self.pollable.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for an address where nobody listens
        try:
            connect(self.pollable, offered(destination.address, "zmq"))
        except zmq.ZMQError:
            self.close()
            raise

    def send_waiting(self) -> None:
        self.is_stalled = False
        try:
            if self._greeting and self.waiting:
                self.pollable.send_multipart(self._greeting, zmq.NOBLOCK)
                self._greeting = None
            while self.waiting and self._is_welcome:
                frame = self.waiting[0] = self.waiting[0].sealed()
                sequence = self._num_sent.to_bytes(8, "little")
                parts: list[bytes | memoryview] = [sequence, encode_header(frame.header), frame.payload.numpy().data]
                self.pollable.send_multipart(parts, zmq.NOBLOCK, copy=False)
                self._num_sent += 1
                self.unanswered[sequence] = self.waiting.popleft()
        except zmq.Again:
            self.is_stalled = True

    def answers(self) -> list[Settled]:
        """Answers that mean nothing are passed over. Raises ConnectionRefusedError when the receiver says so."""
        settled = []
        while self.pollable.poll(0):
            parts = self.pollable.recv_multipart(zmq.NOBLOCK)
            if parts[0] == GREETING:
                self._be_welcome(parts[-1])
            frame = self.unanswered.pop(parts[0], None)
            if frame:
                self._buffers.give_back(frame.payload)
                settled.append(Settled(frame, fault_in(parts[-1])))
        return settled

    def _be_welcome(self, refusal: bytes) -> None:
        if refusal:
            raise ConnectionRefusedError(refusal.decode(errors="replace"))
        self._is_welcome = True

    def let_go(self, frame: OutgoingFrame) -> None:
        self._buffers.give_back(frame.payload)

    def close(self) -> None:
        self._context.destroy(linger=0)


class ZmqSender(PeerLoop):
    """A SendingTransport over ZMQ. Nothing listens on this side.

    What a connection that failed was sending is not used again: ZMQ may still read it.
    """

    def __init__(self, site: Site, settled: Mailbox[Settled]) -> None:
        self._buffers = host_buffers(site.device)
        open_peer = partial(ZmqPeer, greeting=greeting(site.layout), buffers=self._buffers)
        super().__init__("zmq", open_peer, site.timeout_s, settled)

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        del destination
        return self._buffers.take(num_bytes)
