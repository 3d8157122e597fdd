"""The sending side of the torch transport: one thread and one two-rank process group per destination.

Opened for the first frame to a destination; on any failure the group is given up with everything that waited for it,
and the next frame opens another. A stalled destination stalls its own thread only. The backend is gloo.
"""

import logging
import secrets
import threading
from collections import deque
from contextlib import ExitStack

import torch
import torch.distributed as dist
import zmq

from kernels.process_group import open_group, open_store
from kv_transfer.frames import encode_header
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.kv_socket import prepare_for_kv
from kv_transfer.transports.torch_pair import (
    ANSWER,
    FRAME,
    OPEN,
    PAYLOAD,
    RECEIVER,
    SENDER,
    Announcement,
    decode_answer,
    encode_announcement,
)
from kv_transfer.transports.transport import DROPPED, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

_CLOSE_S = 1.0
_MAX_ANSWER_BYTES = 1024
_QUEUED_HEADERS = 4
_UNANSWERED_FRAMES = 2  # one is checked over there while the next is under way
_log = logging.getLogger(__name__)


class TorchSender:
    """A SendingTransport."""

    def __init__(self, host: str, timeout_s: float, settled: Mailbox[Settled]) -> None:
        self.settled = settled
        self.counters = {"connections_gloo": 0}
        self._host = host
        self._timeout_s = timeout_s
        self._pairs: dict[Destination, _Pair] = {}

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        del destination
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, frame: OutgoingFrame) -> None:
        pair = self._pairs.get(frame.destination)
        if pair is None or not pair.add(frame):
            self.counters["connections_gloo"] += 1
            self._pairs[frame.destination] = _Pair(frame, self._host, self._timeout_s, self.settled)

    def drop(self, attempt: Attempt) -> None:
        for pair in self._pairs.values():
            pair.drop(attempt)

    def close_peer(self, epoch: Epoch) -> None:
        for destination in [key for key in self._pairs if key.epoch == epoch]:
            self._pairs.pop(destination).close("the destination group is gone")

    def close(self) -> None:
        """A thread in the middle of an operation ends with it, after timeout_s at the latest; it is not waited for."""
        for pair in self._pairs.values():
            pair.close("the sender was closed")
        for pair in self._pairs.values():
            pair.join(_CLOSE_S)
        self.settled.close()


class _Pair:
    """One destination: what waits for it, and the thread that owns the communicator to it."""

    def __init__(
        self,
        frame: OutgoingFrame,
        host: str,
        timeout_s: float,
        settled: Mailbox[Settled],
    ) -> None:
        self._address = frame.destination.address
        self._source = frame.header.attempt.prefill_epoch, frame.header.source_rank
        self._host = host
        self._timeout_s = timeout_s
        self._settled = settled
        self._id = secrets.token_bytes(8)
        self._waiting = deque([frame])
        self._changed = threading.Condition()
        self._unanswered: deque[tuple[OutgoingFrame, torch.Tensor, dist.Work]] = deque()  # the thread's own
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._run, name="kv-pair-sender", daemon=True)
        self._thread.start()

    def add(self, frame: OutgoingFrame) -> bool:
        """Queue a frame; False when this pair has failed or was closed."""
        with self._changed:
            if self._fault:
                return False
            self._waiting.append(frame)
            self._changed.notify_all()
            return True

    def drop(self, attempt: Attempt) -> None:
        with self._changed:
            dropped = [frame for frame in self._waiting if frame.header.attempt == attempt]
            self._waiting = deque(frame for frame in self._waiting if frame.header.attempt != attempt)
        for frame in dropped:
            self._settled.put(Settled(frame, DROPPED))

    def close(self, fault: str) -> None:
        """Settle all that waits with fault, and let the thread end."""
        with self._changed:
            self._fault = self._fault or fault
            lost, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for frame in lost:
            self._settled.put(Settled(frame, self._fault))

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    # --- everything below runs on the pair's own thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            with ExitStack() as resources:
                socket, group = self._open(resources)
                while frame := self._next():
                    self._send(frame, socket, group)
        except Exception as error:  # whatever torch or ZMQ raise, it ends this pair and nothing else
            _log.warning("KV pair to %s given up: %s", self._address, error)
            self.close(f"pair to {self._address} failed: {error}")
        finally:
            for frame, _, _ in self._unanswered:
                self._settled.put(Settled(frame, self._fault))

    def _open(self, resources: ExitStack) -> "tuple[zmq.Socket[bytes], dist.ProcessGroup]":
        """Wait on a store of our own for the receiver to come, after telling it where."""
        store = open_store(self._host, 0, is_server=True, timeout_s=self._timeout_s)
        context: zmq.Context[zmq.Socket[bytes]] = resources.enter_context(zmq.Context())
        socket = prepare_for_kv(resources.enter_context(context.socket(zmq.PUSH)), _MAX_ANSWER_BYTES, _QUEUED_HEADERS)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDTIMEO, int(self._timeout_s * 1000))
        socket.connect(self._address)
        announcement = Announcement(*self._source, self._host, store.port)
        socket.send_multipart([OPEN, self._id, encode_announcement(announcement)])
        group = open_group(store, SENDER, 2, self._host, "cpu", self._timeout_s)
        resources.callback(group.abort)
        return socket, group

    def _next(self) -> OutgoingFrame | None:
        """Return the next frame when there is one and few are unanswered; None when this pair is over."""
        while self._unanswered and (len(self._unanswered) == _UNANSWERED_FRAMES or not self._waiting):
            self._take_answer()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._fault)
            return None if self._fault else self._waiting.popleft()

    def _take_answer(self) -> None:
        frame, answer, receiving = self._unanswered[0]
        receiving.wait()
        self._unanswered.popleft()
        self._settled.put(Settled(frame, decode_answer(answer)))

    def _send(self, frame: OutgoingFrame, socket: "zmq.Socket[bytes]", group: dist.ProcessGroup) -> None:
        answer = torch.empty(1, dtype=torch.uint8)
        # Asked for before the payload goes: the receiver's answer, like any send of gloo's, waits until it is wanted.
        self._unanswered.append((frame, answer, group.recv([answer], RECEIVER, ANSWER)))
        socket.send_multipart([FRAME, self._id, encode_header(frame.header)])
        group.send([frame.payload], RECEIVER, PAYLOAD).wait()
