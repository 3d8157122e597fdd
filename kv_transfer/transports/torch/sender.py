"""The sending side of the torch transports: headers through a connection, payloads through a communicator beside it.

The loop's thread is peer_loop.py's, queues and deadlines are peers.py's, the greeting and the answers are
connected_peer.py's; a communicator waits for its other end, so each has a thread of its own (pair.py), and a stalled
destination stalls that one only. What gloo and nccl differ in: see factories.py.
"""

from functools import partial
from weakref import WeakSet

import torch

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.connected_peer import ConnectedPeer
from kv_transfer.transports.offers import offered
from kv_transfer.transports.peer_loop import PeerLoop
from kv_transfer.transports.tcp.address import connecting_to
from kv_transfer.transports.torch.communicator import SENDER, Backend, Communicator
from kv_transfer.transports.torch.pair import RENDEZVOUS, ConnectionStore, PairEnd, Pairs, wait_closed
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled, Site

_UNANSWERED_FRAMES = 2  # one is checked over there while the next is under way


class TorchPeer(ConnectedPeer):
    """See peers.Peer. Raises OSError or ValueError for an address that is none."""

    def __init__(
        self, frame: OutgoingFrame, backend: Backend, site: Site, pairs: "WeakSet[PairEnd[torch.Tensor]]"
    ) -> None:
        super().__init__(connecting_to(offered(frame.destination.address, backend.name)), site, frame)
        self._backend = backend
        self._store = ConnectionStore(self._connection.send, site.timeout_s)
        self._pairs = pairs
        self._pair: PairEnd[torch.Tensor] | None = None
        self._fault: Exception | None = None
        self._num_unanswered = 0

    @property
    def is_open(self) -> bool:
        return self._pair is not None and self._pair.is_open

    def answers(self) -> list[tuple[int, bytes]]:
        if self._fault:
            raise ConnectionError(f"the pair was given up: {self._fault}")
        answers = []
        for sequence, said in super().answers():
            if sequence == RENDEZVOUS:
                self._store.hear(said)
            else:
                answers.append((sequence, said))
        if self.is_welcome and self._pair is None:
            self._pair = PairEnd(self._backend, SENDER, self._store, _send, self._give_up)
            self._pairs.add(self._pair)
        self._num_unanswered -= len(answers)
        return answers

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame | None:
        if not self.takes_frames or self._pair is None or self._num_unanswered >= _UNANSWERED_FRAMES:
            return None
        self._num_unanswered += 1
        self.announce(sequence, frame)
        self._pair.put(frame.payload)
        return frame

    def let_go(self, frame: OutgoingFrame) -> None:
        self._backend.buffers.give_back(frame.payload)

    def close(self) -> None:
        super().close()
        if self._pair:
            self._pair.close()

    def _give_up(self, error: Exception) -> None:
        """On the pair's thread: the loop sees the end of the connection, and why."""
        self._fault = error
        self._connection.hang_up()


def _send(communicator: Communicator, payload: torch.Tensor) -> None:
    communicator.send(payload)


class TorchSender(PeerLoop):
    """A SendingTransport."""

    def __init__(self, backend: Backend, site: Site, settled: Mailbox[Settled]) -> None:
        self._backend = backend
        self._pairs: Pairs = WeakSet()
        open_peer = partial(TorchPeer, backend=backend, site=site, pairs=self._pairs)
        super().__init__(backend.name, open_peer, site.timeout_s, settled)

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        del destination
        return self._backend.buffers.take(num_bytes)

    def close(self) -> None:
        super().close()
        wait_closed(self._pairs)
