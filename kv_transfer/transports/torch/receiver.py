"""The receiving side of the torch transports: headers through one ZMQ socket, payloads through pairs of ranks.

Every pair has its own thread and communicator, so that a stalled or dead sender costs its own pair only. On any failure
the pair is given up; the sender announces another when it needs one. Where payloads land, the host's memory or a GPU,
is what gloo and nccl differ in: see factories.py.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import zmq

from kernels.process_group import open_store
from kv_transfer.frames import MAX_HEADER_BYTES, FrameError, FrameHeader, decode_header
from kv_transfer.handshake import refusal
from kv_transfer.mailbox import Mailbox
from kv_transfer.plan import FRAME_BYTES
from kv_transfer.staging import landing_for
from kv_transfer.transports.intake import Intake
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.torch.communicator import RECEIVER, Backend, Communicator
from kv_transfer.transports.torch.pair import (
    FRAME,
    OPEN,
    VERDICT_KEY,
    WELCOME,
    Announcement,
    decode_announcement,
    decode_size,
)
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, ReceivingFault, Site
from protocol.errors import WireError
from protocol.identity import Epoch

MAX_QUEUED_HEADERS = 16
"""A sender announces a frame, then waits until it is taken; one that is further ahead is not ours."""

_MAX_MESSAGE_BYTES = MAX_HEADER_BYTES + 1024
_CLOSE_S = 1.0
_log = logging.getLogger(__name__)


class Announced(NamedTuple):
    """A frame whose payload comes next."""

    sequence: bytes
    num_bytes: int
    header: FrameHeader


class TorchReceiver:
    """A ReceivingTransport. Raises zmq.ZMQError when the site's host cannot be bound."""

    def __init__(self, backend: Backend, site: Site, arrivals: Mailbox[Arrival]) -> None:
        self.arrivals = arrivals
        self.counters: dict[str, int] = dict.fromkeys(RECEIVING_FAULTS, 0)
        self._site = site
        self._backend = backend
        self._intake = Intake(arrivals, self.counters, landing_for(site.device))
        self._pairs: dict[bytes, _Pair] = {}
        self._lock = threading.Lock()
        self._listener = Listener(zmq.ROUTER, site.host, _MAX_MESSAGE_BYTES, self._handle, self.counters)
        self.address = self._listener.address

    def close_peer(self, epoch: Epoch) -> None:
        self._close_pairs(lambda announcement: announcement.source_epoch == epoch)

    def close(self) -> None:
        """A thread in the middle of an operation ends with it, after timeout_s at the latest; it is not waited for.

        One that opens a pair over NCCL ends when the other end has come, and perhaps never if that died just then.
        """
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
        peer, *message = (part.bytes for part in parts)
        try:
            match message:
                case [kind, body] if kind == OPEN:
                    self._open(peer, decode_announcement(body))
                case [kind, sequence, size, header] if kind == FRAME:
                    announced = Announced(sequence, decode_size(size, FRAME_BYTES), decode_header(header))
                    self._announce(peer, announced)
                case _:
                    self.counters["bad_message"] += 1
        except FrameError as error:
            self.counters[error.fault] += 1
            self._give_up(peer)
        except (ValueError, WireError):
            self.counters["bad_message"] += 1
            self._give_up(peer)

    def _open(self, peer: bytes, announcement: Announcement) -> None:
        origin = announcement.source_epoch, announcement.source_rank
        self._close_pairs(lambda earlier: (earlier.source_epoch, earlier.source_rank) == origin)
        self._give_up(peer)  # one connection is one pair's
        with self._lock:
            self._pairs[peer] = _Pair(announcement, partial(self._run_pair, peer), self._intake)

    def _announce(self, peer: bytes, announced: Announced) -> None:
        pair = self._pairs.get(peer)
        if pair is None or not pair.add(announced):
            self._intake.lose(announced.header)
            self._give_up(peer)

    def _give_up(self, peer: bytes) -> None:
        """Whatever its sender says next has lost its place."""
        with self._lock:
            pair = self._pairs.pop(peer, None)
        if pair:
            pair.close()

    # --- everything below runs on a pair's own thread -----------------------------------------------------------------

    def _run_pair(self, peer: bytes, pair: "_Pair") -> None:
        try:
            self._serve(peer, pair)
        except ConnectionRefusedError as error:
            _log.warning("rank %s refused: %s", pair.announcement.source_rank, error)
            self.counters["refused_peer"] += 1
            pair.close()
        except Exception as error:  # whatever torch raises, it ends this pair and nothing else
            _log.warning("KV pair from rank %s given up: %s", pair.announcement.source_rank, error)
            self.counters["broken_pair"] += 1
            pair.close()

    def _serve(self, peer: bytes, pair: "_Pair") -> None:
        where, reason = pair.announcement, refusal(self._site.layout, pair.announcement.greeting)
        store = open_store(where.host, where.port, is_server=False, timeout_s=self._site.timeout_s)
        store.set(VERDICT_KEY, reason or WELCOME)
        if reason:
            raise ConnectionRefusedError(reason)
        with ExitStack() as cleanup:
            communicator = self._backend.open_communicator(store, RECEIVER)
            cleanup.callback(communicator.abort)
            while announced := pair.next():
                fault = self._receive(announced, communicator)
                self._listener.send([peer, announced.sequence, (fault or "").encode()])

    def _receive(self, announced: Announced, communicator: Communicator) -> ReceivingFault | None:
        buffers = self._backend.buffers
        payload = buffers.take(announced.num_bytes)
        try:
            communicator.receive(payload)
        except Exception:
            communicator.abort()  # before anybody else may use that memory
            self._intake.lose(announced.header)
            raise
        return self._intake.take(announced.header, payload, partial(buffers.give_back, payload))


class _Pair:
    """One sending rank: the frames that it has announced, and the thread that takes them."""

    def __init__(self, announcement: Announcement, run: "Callable[[_Pair], None]", intake: Intake) -> None:
        self.announcement = announcement
        self._intake = intake
        self._announced: deque[Announced] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=run, args=[self], name="kv-pair-receiver", daemon=True)
        self._thread.start()

    def add(self, announced: Announced) -> bool:
        """Queue a frame; False when this pair has failed or its sender does not keep to the rules."""
        with self._changed:
            if self._closed or len(self._announced) >= MAX_QUEUED_HEADERS:
                return False
            self._announced.append(announced)
            self._changed.notify_all()
            return True

    def next(self) -> Announced | None:
        """Wait for a frame; None when this pair is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._announced or self._closed)
            return None if self._closed else self._announced.popleft()

    def close(self) -> None:
        """Let the thread end; frames that were announced and have not come are reported as faults."""
        with self._changed:
            self._closed = True
            lost, self._announced = self._announced, deque()
            self._changed.notify_all()
        for announced in lost:
            self._intake.lose(announced.header)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
