"""What sending transports with one thread for all destinations share: queues, deadlines, and who hears of what.

A Peer is one destination's connection. It is opened for the first frame, and closed for good when the destination's
epoch ends, its connection fails, or nothing was answered for timeout_s. How bytes travel is the Peer's business alone:
see zmq_sender.py and shm_sender.py.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import zmq

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.transport import DROPPED, RECEIVING_FAULTS, REFUSED, Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

_log = logging.getLogger(__name__)


class Peer(Protocol):
    """One destination: its connection, what waits for it, and what it has not answered yet."""

    waiting: deque[OutgoingFrame]
    is_stalled: bool  # the connection took less than there was to send
    unanswered: dict[bytes, OutgoingFrame]

    @property
    def pollable(self) -> "zmq.Socket[bytes] | int":
        """Readable when there are answers."""

    def send_waiting(self) -> None:
        """Send until the connection takes no more. Raises OSError when it is gone."""

    def answers(self) -> list[Settled]:
        """Return what has been answered, without waiting. Raises OSError when the connection is gone."""

    def let_go(self, frame: OutgoingFrame) -> None:
        """The frame will not be sent; it is no longer in waiting."""

    def close(self) -> None:
        """Close the connection."""


class PeerLoop:
    """A SendingTransport. open_peer may raise OSError: then the frame that wanted it is settled with that."""

    def __init__(
        self, name: str, open_peer: Callable[[Destination], Peer], timeout_s: float, settled: Mailbox[Settled]
    ) -> None:
        self.settled = settled
        self.counters = {f"connections_{name}": 0}
        self._name = name
        self._open_peer = open_peer
        self._timeout_s = timeout_s
        self._commands: Mailbox[Callable[[], None]] = Mailbox(0)
        self._peers: dict[Destination, Peer] = {}
        self._progress_at: dict[Destination, float] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        del destination
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, frame: OutgoingFrame) -> None:
        self._commands.put(partial(self._add, frame))

    def drop(self, attempt: Attempt) -> None:
        self._commands.put(partial(self._drop, attempt))

    def close_peer(self, epoch: Epoch) -> None:
        self._commands.put(partial(self._close_peers_of, epoch))

    def close(self) -> None:
        self._is_closing = True
        self._commands.ring()
        self._thread.join()
        self._commands.close()
        self.settled.close()

    # --- everything below runs on the owner thread --------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            self._wait()
            for command in self._commands.take(1):
                command()
            for destination, peer in list(self._peers.items()):
                self._serve(destination, peer)
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._commands.fileno(), zmq.POLLIN)
        for peer in self._peers.values():
            poller.register(peer.pollable, zmq.POLLIN | zmq.POLLOUT if peer.is_stalled else zmq.POLLIN)
        poller.poll(int(min(1.0, self._timeout_s / 4) * 1000))

    def _serve(self, destination: Destination, peer: Peer) -> None:
        try:
            answers = peer.answers()
            for settled in answers:
                self.settled.put(settled)
            peer.send_waiting()
        except Exception as error:
            _log.warning("connection to %s closed: %s", destination.address, error)
            self._close_peer(destination, f"connection to {destination.address} failed: {error}")
            return
        now = time.monotonic()
        if answers or not (peer.waiting or peer.unanswered):
            self._progress_at[destination] = now
        elif now - self._progress_at[destination] > self._timeout_s:
            self._close_peer(destination, f"no answer from {destination.address} for {self._timeout_s:g} s")

    def _add(self, frame: OutgoingFrame) -> None:
        destination = frame.destination
        try:
            peer = self._peers.get(destination) or self._open(destination)
        except (OSError, ValueError) as error:
            self.settled.put(Settled(frame, f"cannot connect to {destination.address}: {error}"))
            return
        self._peers[destination] = peer
        if not (peer.waiting or peer.unanswered):
            self._progress_at[destination] = time.monotonic()
        peer.waiting.append(frame)

    def _open(self, destination: Destination) -> Peer:
        peer = self._open_peer(destination)
        self.counters[f"connections_{self._name}"] += 1
        return peer

    def _drop(self, attempt: Attempt) -> None:
        for peer in self._peers.values():
            dropped = [frame for frame in peer.waiting if frame.header.attempt == attempt]
            peer.waiting = deque(frame for frame in peer.waiting if frame.header.attempt != attempt)
            for frame in dropped:
                peer.let_go(frame)
                self.settled.put(Settled(frame, DROPPED))

    def _close_peers_of(self, epoch: Epoch) -> None:
        for destination in [key for key in self._peers if key.epoch == epoch]:
            self._close_peer(destination, "the destination group is gone")

    def _close_peer(self, destination: Destination, fault: str) -> None:
        peer = self._peers.pop(destination)
        del self._progress_at[destination]
        peer.close()
        for frame in (*peer.unanswered.values(), *peer.waiting):
            self.settled.put(Settled(frame, fault))


def fault_in(answer: bytes) -> str | None:
    """Return what the peer says is wrong with a frame, in words from the closed set; None when nothing is."""
    if not answer:
        return None
    text = answer.decode(errors="replace")
    return REFUSED + (text if text in RECEIVING_FAULTS else "unknown fault")
