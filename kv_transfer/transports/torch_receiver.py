"""The receiving side of the torch transport: headers through one ZMQ socket, payloads through pairs of ranks.

Every pair has its own thread and two-rank process group, so that a stalled or dead sender costs its own pair only. On
any failure the pair is given up; the sender announces another when it needs one. The backend is gloo.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
import zmq

from kv_transfer.frames import MAX_HEADER_BYTES, FrameError, FrameHeader, check_payload, decode_header
from kv_transfer.mailbox import Mailbox
from kv_transfer.plan import FRAME_BYTES
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.torch_pair import (
    ANSWER,
    FRAME,
    OPEN,
    PAYLOAD,
    SENDER,
    Announcement,
    decode_announcement,
    encode_answer,
    join_pair,
)
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, ReceivingFault
from protocol.errors import WireError
from protocol.identity import Epoch

MAX_QUEUED_HEADERS = 16
"""A sender announces a frame, then waits until it is taken; one that is further ahead is not ours."""

_MAX_MESSAGE_BYTES = MAX_HEADER_BYTES + 1024
_CLOSE_S = 1.0
_log = logging.getLogger(__name__)


class TorchReceiver:
    """A ReceivingTransport. Raises zmq.ZMQError when host cannot be bound."""

    def __init__(self, host: str, timeout_s: float, arrivals: Mailbox[Arrival]) -> None:
        self.arrivals = arrivals
        self.counters: dict[str, int] = dict.fromkeys(RECEIVING_FAULTS, 0)
        self._host = host
        self._timeout_s = timeout_s
        self._pairs: dict[bytes, _Pair] = {}
        self._lock = threading.Lock()
        self._listener = Listener(zmq.PULL, host, _MAX_MESSAGE_BYTES, self._handle, self.counters)
        self.address = self._listener.address

    def close_peer(self, epoch: Epoch) -> None:
        self._close_pairs(lambda announcement: announcement.source_epoch == epoch)

    def close(self) -> None:
        """A thread in the middle of an operation ends with it, after timeout_s at the latest; it is not waited for."""
        self.arrivals.close()
        self._listener.close()
        for pair in self._close_pairs(lambda _: True):
            pair.join(_CLOSE_S)

    def _close_pairs(self, is_meant: Callable[[Announcement], bool]) -> "list[_Pair]":
        with self._lock:
            meant = {key: pair for key, pair in self._pairs.items() if is_meant(pair.announcement)}
            for key, pair in meant.items():
                del self._pairs[key]
                pair.close()
        return list(meant.values())

    def _handle(self, parts: list[zmq.Frame]) -> None:
        """Open a pair, or pass a header to its pair; runs on the listener's thread."""
        try:
            kind, pair_id, body = (part.bytes for part in parts)
            if kind == OPEN:
                self._open(pair_id, decode_announcement(body))
            elif kind == FRAME:
                self._announce(pair_id, decode_header(body))
            else:
                self.counters["bad_message"] += 1
        except FrameError as error:
            self.counters[error.fault] += 1
            self._give_up(pair_id)
        except (ValueError, WireError):
            self.counters["bad_message"] += 1

    def _open(self, pair_id: bytes, announcement: Announcement) -> None:
        origin = announcement.source_epoch, announcement.source_rank
        self._close_pairs(lambda earlier: (earlier.source_epoch, earlier.source_rank) == origin)
        with self._lock:
            self._pairs[pair_id] = _Pair(announcement, self._host, self._timeout_s, self.arrivals, self.counters)

    def _announce(self, pair_id: bytes, header: FrameHeader) -> None:
        pair = self._pairs.get(pair_id)
        if pair is None or not pair.add(header):
            self.counters["broken_pair"] += 1
            self.arrivals.put(Arrival(header, None, "broken_pair"))
            self._give_up(pair_id)

    def _give_up(self, pair_id: bytes) -> None:
        """Whatever its sender says next has lost its place."""
        with self._lock:
            pair = self._pairs.pop(pair_id, None)
        if pair:
            pair.close()


class _Pair:
    """One sending rank: the headers it has announced, and the thread that owns the communicator to it."""

    def __init__(
        self,
        announcement: Announcement,
        host: str,
        timeout_s: float,
        arrivals: Mailbox[Arrival],
        counters: dict[str, int],
    ) -> None:
        self.announcement = announcement
        self._host = host
        self._timeout_s = timeout_s
        self._arrivals = arrivals
        self._counters = counters
        self._headers: deque[FrameHeader] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-pair-receiver", daemon=True)
        self._thread.start()

    def add(self, header: FrameHeader) -> bool:
        """Queue a header; False when this pair has failed or its sender does not keep to the rules."""
        with self._changed:
            if self._closed or len(self._headers) >= MAX_QUEUED_HEADERS:
                return False
            self._headers.append(header)
            self._changed.notify_all()
            return True

    def close(self) -> None:
        """Let the thread end; frames that were announced and have not come are reported as faults."""
        with self._changed:
            self._closed = True
            lost, self._headers = self._headers, deque()
            self._changed.notify_all()
        for header in lost:
            self._arrivals.put(Arrival(header, None, "broken_pair"))

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    # --- everything below runs on the pair's own thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            group = join_pair(self.announcement, self._host, self._timeout_s)
            try:
                while header := self._next():
                    self._receive(header, group)
            finally:
                group.abort()
        except Exception as error:  # whatever torch raises, it ends this pair and nothing else
            _log.warning("KV pair from rank %s given up: %s", self.announcement.source_rank, error)
            self._counters["broken_pair"] += 1
            self.close()

    def _next(self) -> FrameHeader | None:
        with self._changed:
            self._changed.wait_for(lambda: self._headers or self._closed)
            return None if self._closed else self._headers.popleft()

    def _receive(self, header: FrameHeader, group: dist.ProcessGroup) -> None:
        """Receive one payload, into room for the largest: gloo ends the process when a message exceeds its room."""
        staging = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        try:
            group.recv([staging], SENDER, PAYLOAD).wait()
        except Exception:
            self._arrivals.put(Arrival(header, None, "broken_pair"))
            raise
        payload = staging[: header.piece.num_bytes]
        fault = _fault_of(header, payload)
        if fault:
            self._counters[fault] += 1
            self._arrivals.put(Arrival(header, None, fault))
        else:
            self._arrivals.put(Arrival(header, payload, None), header.piece.num_bytes)
        group.send([encode_answer(fault)], SENDER, ANSWER).wait()


def _fault_of(header: FrameHeader, payload: torch.Tensor) -> ReceivingFault | None:
    try:
        check_payload(header, payload.numpy().data)
    except FrameError as error:
        return error.fault
    return None
