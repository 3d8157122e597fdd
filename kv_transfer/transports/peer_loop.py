"""The thread behind a sending transport whose peers can be polled: calls on peers.py, and sleeps in between.

Every transport's. What is sent, dropped and closed comes from the main thread as commands; send_at_once() sends a frame
there and then where nothing is in its way, for transports whose sending is no more than a small packet: to wake this
thread costs more than sending. Where payloads lie is each transport's own business: with staging() a PeerLoop is a
SendingTransport.
"""

import select
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from kv_transfer import threads
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.peers import Peer, Peers
from kv_transfer.transports.transport import OutgoingFrame, Settled
from protocol.identity import Attempt, Epoch

_WRITABLE = select.POLLIN | select.POLLOUT
_POLL_S = 0.25
"""How late the thread looks at the clock, at most."""


class PollablePeer(Peer, Protocol):
    """A Peer that can wake a thread."""

    @property
    def pollable(self) -> int:
        """Readable when answers() has something to do."""


class PeerLoop:
    """open_peer may raise OSError or ValueError: then the frame that wanted it is settled with that."""

    def __init__(
        self, name: str, open_peer: Callable[[OutgoingFrame], PollablePeer], timeout_s: float, settled: Mailbox[Settled]
    ) -> None:
        self.settled = settled
        self._name = name
        self._poll_ms = int(min(_POLL_S, timeout_s / 8) * 1000)
        self._commands: Mailbox[Callable[[], None]] = Mailbox(0)
        self._peers = Peers(open_peer, settled.put, timeout_s, time.monotonic)
        self._lock = threading.Lock()  # of the peers; the main thread never waits for it
        self._is_closing = False
        self._thread = threads.start("kv-sender", self._run)

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
        if threads.has_ended(self._thread):
            self._commands.close()
        self.settled.close()

    # --- everything below runs on the owner thread --------------------------------------------------------------------

    def _run(self) -> None:
        watched, poller = self._watch({}, select.poll())
        while not self._is_closing:
            ready = poller.poll(self._poll_ms if self._peers.is_busy else None)
            with self._lock:
                if any(fd == self._commands.fileno() for fd, _ in ready):
                    for command in self._commands.take(1):
                        command()
                self._peers.serve()
                watched, poller = self._watch(watched, poller)
        self._peers.close()

    def _watch(self, watched: dict[int, int], poller: "select.poll") -> tuple[dict[int, int], "select.poll"]:
        """Return what to sleep on, by descriptor, and what sleeps on it: the same as before if nothing has changed."""
        wanted = {peer.pollable: _WRITABLE if peer.is_stalled else select.POLLIN for peer in self._peers}
        wanted[self._commands.fileno()] = select.POLLIN
        if wanted == watched:
            return watched, poller
        poller = select.poll()
        for fd, events in wanted.items():
            poller.register(fd, events)
        return wanted, poller
