"""The sending side of shm and cuda_ipc: payloads are gathered straight into memory that the receiver reads.

One slab and one Unix socket per connection. A slab that was given up is never written again, so a receiver that is
still reading it reads what was sent. The thread is peer_loop.py's, queues and deadlines are peers.py's, the greeting
and the answers are connected_peer.py's. A message is small and its socket never waits, so the main thread sends it
where nothing is in its way.
"""

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.connected_peer import ConnectedPeer
from kv_transfer.transports.offers import offered
from kv_transfer.transports.peer_loop import PeerLoop
from kv_transfer.transports.slab.host_slab import OwnSlab
from kv_transfer.transports.slab.reach import Reach, connected_to
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled, Site


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


class SlabPeer(ConnectedPeer):
    """See peers.Peer. Raises OSError or ValueError when nobody listens at the destination."""

    def __init__(self, frame: OutgoingFrame, reach: Reach, site: Site, slabs: Slabs) -> None:
        self._destination = frame.destination
        self._slabs = slabs
        with ExitStack() as undo:
            undo.callback(slabs.drop, frame.destination)
            connected = connected_to(reach.name_at(offered(frame.destination.address, reach.scheme)))
            undo.callback(connected.close)
            self._slab = slabs.of(frame.destination)
            lent = self._slab.lend()
            undo.pop_all()
        self._lent_fd: int | None = lent.fd
        super().__init__(connected, site, frame, lent.description, (lent.fd,))

    def answers(self) -> list[tuple[int, bytes]]:
        answers = super().answers()
        if self.has_greeted:
            self._close_lent()
        return answers

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame | None:
        sent = self._in_slab(frame) if self.takes_frames else None
        if sent is None:
            return None
        slot = self._slab.index_of(sent.payload)
        assert slot is not None
        self.announce(sequence, sent, slot)
        return sent

    def let_go(self, frame: OutgoingFrame) -> None:
        self._slab.give_back(frame.payload)

    def rescue(self, frame: OutgoingFrame) -> OutgoingFrame:
        return self._slab.rescue(frame)

    def close(self) -> None:
        super().close()
        self._close_lent()
        self._slabs.drop(self._destination)

    def _close_lent(self) -> None:
        """The receiver has a descriptor of its own."""
        if self._lent_fd is not None:
            os.close(self._lent_fd)
            self._lent_fd = None

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


class SlabSender(PeerLoop):
    """A SendingTransport whose staging is shared with the receiver."""

    def __init__(self, reach: Reach, new_slab: Callable[[], OwnSlab], site: Site, settled: Mailbox[Settled]) -> None:
        self._slabs = Slabs(new_slab)
        open_peer = partial(SlabPeer, reach=reach, site=site, slabs=self._slabs)
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
