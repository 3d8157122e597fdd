"""What sending transports with one thread for all destinations share: the thread, which sleeps until something happens.

It turns calls of the main thread into calls of peers.py, which keeps the books: queues, deadlines, who hears of what.
Where the main thread may send a frame itself, it does: waking a thread costs more than sending.
Where payloads lie is each transport's own business: with staging() a PeerLoop is a SendingTransport.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import zmq

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.peers import Peer, Peers
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch


class PollablePeer(Peer, Protocol):
    """A Peer that can wake a thread."""

    @property
    def pollable(self) -> "zmq.Socket[bytes] | int":
        """Readable when there are answers."""


class PeerLoop:
    """open_peer may raise OSError: then the frame that wanted it is settled with that."""

    def __init__(
        self, name: str, open_peer: Callable[[Destination], PollablePeer], timeout_s: float, settled: Mailbox[Settled]
    ) -> None:
        self.settled = settled
        self._name = name
        self._timeout_s = timeout_s
        self._commands: Mailbox[Callable[[], None]] = Mailbox(0)
        self._peers = Peers(open_peer, settled.put, timeout_s, time.monotonic)
        self._lock = threading.Lock()  # of the peers; the main thread never waits for it
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    @property
    def counters(self) -> dict[str, int]:
        return {f"connections_{self._name}": self._peers.num_opened}

    def send(self, frame: OutgoingFrame) -> None:
        self._commands.put(partial(self._peers.add, frame))

    def send_at_once(self, frame: OutgoingFrame) -> bool:
        """Send a frame from the main thread, if nothing is in its way; return whether that was so.

        Only for peers that can send while another thread sleeps on their pollable.
        """
        if not frame.is_whole or not self._lock.acquire(blocking=False):
            return False
        try:
            is_done = self._commands.is_empty and self._peers.send_at_once(frame)
            if any(peer.is_stalled for peer in self._peers):
                self._commands.ring()  # the thread should wait for that peer to take more
            return is_done
        finally:
            self._lock.release()

    def drop(self, attempt: Attempt) -> None:
        self._commands.put(partial(self._peers.drop, attempt))

    def close_peer(self, epoch: Epoch) -> None:
        self._commands.put(partial(self._peers.close_epoch, epoch))

    def close(self) -> None:
        self._is_closing = True
        self._commands.ring()
        self._thread.join()
        self._commands.close()
        self.settled.close()

    # --- everything below runs on the owner thread --------------------------------------------------------------------

    def _run(self) -> None:
        poll_ms, poller = int(min(1.0, self._timeout_s / 4) * 1000), self._poller()
        while not self._is_closing:
            poller.poll(poll_ms)
            with self._lock:
                for command in self._commands.take(1):
                    command()
                self._peers.serve()
                poller = self._poller()
        self._peers.close()

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._commands.fileno(), zmq.POLLIN)
        for peer in self._peers:
            poller.register(peer.pollable, zmq.POLLIN | zmq.POLLOUT if peer.is_stalled else zmq.POLLIN)
        return poller
