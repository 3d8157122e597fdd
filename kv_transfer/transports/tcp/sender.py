"""The sending side of the tcp transport: payloads are sent from where they lie, after their headers.

The thread is peer_loop.py's, queues and deadlines are peers.py's, the greeting and the answers are connected_peer.py's.
"""

from functools import partial

import torch

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.buffers import Buffers, host_buffers
from kv_transfer.transports.connected_peer import ConnectedPeer
from kv_transfer.transports.offers import offered
from kv_transfer.transports.peer_loop import PeerLoop
from kv_transfer.transports.tcp.address import connecting_to
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled, Site


class TcpPeer(ConnectedPeer):
    """See peers.Peer. Raises OSError or ValueError for an address that is none."""

    def __init__(self, frame: OutgoingFrame, site: Site, buffers: Buffers) -> None:
        self._buffers = buffers
        super().__init__(connecting_to(offered(frame.destination.address, "zmq")), site, frame)

    def send(self, sequence: int, frame: OutgoingFrame) -> OutgoingFrame | None:
        if not self.takes_frames:
            return None
        self.announce(sequence, frame, payload=frame.payload.numpy().data)
        return frame

    def let_go(self, frame: OutgoingFrame) -> None:
        self._buffers.give_back(frame.payload)


class TcpSender(PeerLoop):
    """A SendingTransport over TCP. Nothing listens on this side."""

    def __init__(self, site: Site, settled: Mailbox[Settled]) -> None:
        self._buffers = host_buffers(site.device)
        super().__init__("zmq", partial(TcpPeer, site=site, buffers=self._buffers), site.timeout_s, settled)

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        del destination
        return self._buffers.take(num_bytes)
