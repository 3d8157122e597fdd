"""The sending side of the torch transports: one thread and one communicator per destination.

Opened for the first frame to a destination; on any failure the communicator is given up with everything that waited for
it, and the next frame opens another. A stalled destination stalls its own thread only. What gloo and nccl differ in:
see factories.py.
"""

import logging
import threading
import time
from collections import deque
from contextlib import ExitStack
from typing import NamedTuple

import torch
import zmq
from torch.distributed.distributed_c10d import Store

from kernels.process_group import open_store
from kv_transfer.frames import encode_header
from kv_transfer.handshake import greeting
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.kv_socket import prepare_for_kv
from kv_transfer.transports.offers import offered
from kv_transfer.transports.peers import fault_in
from kv_transfer.transports.torch.communicator import SENDER, Backend, Communicator
from kv_transfer.transports.torch.pair import (
    FRAME,
    OPEN,
    VERDICT_KEY,
    WELCOME,
    Announcement,
    encode_announcement,
    encode_size,
)
from kv_transfer.transports.transport import DROPPED, Destination, OutgoingFrame, Settled, Site
from protocol.identity import Attempt, Epoch
from protocol.sockets import connect

_CLOSE_S = 1.0
_MAX_ANSWER_BYTES = 1024
_QUEUED_HEADERS = 4
_UNANSWERED_FRAMES = 2  # one is checked over there while the next is under way
_log = logging.getLogger(__name__)


class Wire(NamedTuple):
    """What a pair's thread speaks through."""

    socket: "zmq.Socket[bytes]"
    communicator: Communicator


class TorchSender:
    """A SendingTransport."""

    def __init__(self, backend: Backend, site: Site, settled: Mailbox[Settled]) -> None:
        self.settled = settled
        self.counters = {f"connections_{backend.name}": 0}
        self._backend = backend
        self._site = site
        self._pairs: dict[Destination, _Pair] = {}

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        del destination
        return self._backend.buffers.take(num_bytes)

    def send(self, frame: OutgoingFrame) -> None:
        pair = self._pairs.get(frame.destination)
        if pair is None or not pair.add(frame):
            self.counters[f"connections_{self._backend.name}"] += 1
            self._pairs[frame.destination] = _Pair(frame, self._backend, self._site, self.settled)

    def drop(self, attempt: Attempt) -> None:
        for pair in self._pairs.values():
            pair.drop(attempt)

    def close_peer(self, epoch: Epoch) -> None:
        for destination in [key for key in self._pairs if key.epoch == epoch]:
            self._pairs.pop(destination).close("the destination group is gone")

    def close(self) -> None:
        """A thread in the middle of an operation ends with it, after timeout_s at the latest; it is not waited for.

        One that opens a pair over NCCL ends when the other end has come, and perhaps never if that died just then.
        """
        for pair in self._pairs.values():
            pair.close("the sender was closed")
        for pair in self._pairs.values():
            pair.join(_CLOSE_S)
        self.settled.close()


class _Pair:
    """One destination: what waits for it, and the thread that owns the communicator to it."""

    def __init__(self, frame: OutgoingFrame, backend: Backend, site: Site, settled: Mailbox[Settled]) -> None:
        self._address = offered(frame.destination.address, backend.name)
        header = frame.header
        self._source = header.attempt.epoch_opposite(frame.destination.epoch), header.source_rank
        self._backend = backend
        self._site = site
        self._settled = settled
        self._waiting = deque([frame])
        self._lock = threading.Lock()
        self._bell: Mailbox[None] = Mailbox(0)
        self._unanswered: dict[bytes, OutgoingFrame] = {}  # the thread's own
        self._num_sent = 0
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._run, name="kv-pair-sender", daemon=True)
        self._thread.start()

    def add(self, frame: OutgoingFrame) -> bool:
        """Queue a frame; False when this pair has failed or was closed."""
        with self._lock:
            if self._fault:
                return False
            self._waiting.append(frame)
        self._bell.ring()
        return True

    def drop(self, attempt: Attempt) -> None:
        with self._lock:
            dropped = [frame for frame in self._waiting if frame.header.attempt == attempt]
            self._waiting = deque(frame for frame in self._waiting if frame.header.attempt != attempt)
        for frame in dropped:
            self._settle(frame, DROPPED)

    def close(self, fault: str) -> None:
        """Settle all that waits with fault, and let the thread end."""
        with self._lock:
            self._fault = self._fault or fault
            lost, self._waiting = self._waiting, deque()
        self._bell.ring()
        for frame in lost:
            self._settled.put(Settled(frame, self._fault))

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _settle(self, frame: OutgoingFrame, fault: str | None) -> None:
        """Of a frame that nobody reads any more."""
        self._backend.buffers.give_back(frame.payload)
        self._settled.put(Settled(frame, fault))

    # --- everything below runs on the pair's own thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            with ExitStack() as resources:
                self._serve(self._open(resources))
        except Exception as error:  # whatever torch or ZMQ raise, it ends this pair and nothing else
            _log.warning("KV pair to %s given up: %s", self._address, error)
            self.close(f"pair to {self._address} failed: {error}")
        finally:
            self._bell.close()
            for frame in self._unanswered.values():
                self._settled.put(Settled(frame, self._fault))

    def _open(self, resources: ExitStack) -> Wire:
        """Wait on a store of our own for the receiver to come, after telling it where."""
        site = self._site
        store = open_store(site.host, 0, is_server=True, timeout_s=site.timeout_s)
        context: zmq.Context[zmq.Socket[bytes]] = resources.enter_context(zmq.Context())
        socket = prepare_for_kv(resources.enter_context(context.socket(zmq.DEALER)), _MAX_ANSWER_BYTES, _QUEUED_HEADERS)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDTIMEO, int(site.timeout_s * 1000))
        connect(socket, self._address)
        announcement = Announcement(*self._source, site.host, store.port, greeting(site.layout))
        socket.send_multipart([OPEN, encode_announcement(announcement)])
        verdict = store.get(VERDICT_KEY).decode(errors="replace")
        if verdict != WELCOME:
            raise ConnectionRefusedError(verdict)
        communicator = self._open_within(site.timeout_s, store)
        resources.callback(communicator.abort)
        return Wire(socket, communicator)

    def _open_within(self, timeout_s: float, store: Store) -> Communicator:
        """The receiver has just answered, so it is nearly there; should it die now, nobody waits for this thread."""
        timer = threading.Timer(timeout_s, self.close, [f"pair to {self._address} did not open in {timeout_s:g} s"])
        timer.daemon = True
        timer.start()
        try:
            return self._backend.open_communicator(store, SENDER)
        finally:
            timer.cancel()

    def _serve(self, wire: Wire) -> None:
        poller = zmq.Poller()
        poller.register(wire.socket, zmq.POLLIN)
        poller.register(self._bell.fileno(), zmq.POLLIN)
        progress_at = time.monotonic()
        while not self._fault:
            if self._take_answers(wire.socket) or not self._unanswered:
                progress_at = time.monotonic()
            elif time.monotonic() - progress_at > self._site.timeout_s:
                raise TimeoutError(f"no answer for {self._site.timeout_s:g} s")
            frame = self._next()
            if frame:
                self._send(frame, wire)
            else:
                poller.poll(min(1000, int(self._site.timeout_s * 250)))
                self._bell.take(1)

    def _next(self) -> OutgoingFrame | None:
        """Return the next frame when there is one and few are unanswered."""
        with self._lock:
            may_send = self._waiting and len(self._unanswered) < _UNANSWERED_FRAMES
            return self._waiting.popleft() if may_send else None

    def _take_answers(self, socket: "zmq.Socket[bytes]") -> int:
        """Return how many frames were settled; answers that mean nothing are passed over."""
        num_settled = 0
        while socket.poll(0):
            parts = socket.recv_multipart(zmq.NOBLOCK)
            frame = self._unanswered.pop(parts[0], None)
            if frame:
                self._settle(frame, fault_in(parts[-1]))
                num_settled += 1
        return num_settled

    def _send(self, frame: OutgoingFrame, wire: Wire) -> None:
        sequence = self._num_sent.to_bytes(8, "little")
        self._num_sent += 1
        self._unanswered[sequence] = frame
        sealed = frame.sealed()
        header = encode_header(sealed.header)
        wire.socket.send_multipart([FRAME, sequence, encode_size(len(sealed.payload)), header])
        wire.communicator.send(sealed.payload)
