"""What a transport is: the sending and the receiving side, and what passes through them.

KVSender and KVReceiver call these; every other file in this folder is one of them. A transport moves and checks frames;
it knows nothing of caches, block tables or which transfers are live.

All methods are called by the rank's main thread and return at once; the network is the business of threads behind them,
each of which outlives every bad message.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import msgspec
import torch

from kv_transfer.frames import FrameFault, FrameHeader
from kv_transfer.mailbox import Mailbox
from kv_transfer.staging import Digests
from protocol.identity import Attempt, Epoch
from protocol.layout import KVLayout

INBOX_BYTES = 256 << 20
"""Checked payloads that may wait for one receiving rank's main thread; beyond it the senders wait."""

ConnectionFault = Literal["bad_message", "stranger", "refused_peer", "broken_pair", "internal_error"]
ReceivingFault = FrameFault | ConnectionFault
RECEIVING_FAULTS: tuple[ReceivingFault, ...] = (
    "bad_version",
    "bad_header",
    "wrong_size",
    "bad_digest",
    "bad_message",
    "stranger",
    "refused_peer",
    "broken_pair",
    "internal_error",
)

DROPPED = "dropped"
"""Why a frame was settled without being sent: its attempt was dropped."""

REFUSED = "refused by the receiver: "
"""How the fault of a frame begins that arrived, but not as it was sent; the name of what was wrong follows."""


class Site(NamedTuple):
    """One end of a transport: whose cache it serves, on which device, and where it may listen.

    timeout_s bounds every wait for a peer, but that of a pair over NCCL for its other end while it opens. secret: the
    cluster's; senders and receivers without the same one do not talk.
    """

    host: str
    device: torch.device
    layout: KVLayout
    timeout_s: float
    secret: bytes


class Destination(NamedTuple):
    """One receiving rank in one life of its group. The same address under another epoch is another peer."""

    epoch: Epoch
    address: str


class OutgoingFrame(NamedTuple):
    """A header, and its payload as flat bytes, uint8 [num_bytes].

    While digests is there, the header is without them and the payload may still be on its way into its memory.
    """

    destination: Destination
    header: FrameHeader
    payload: torch.Tensor
    digests: Digests | None = None

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing to wait for."""
        return not callable(self.digests)

    def sealed(self) -> "OutgoingFrame":
        """Return the frame as it is sent, when its payload is whole; the main thread has only those sealed that are."""
        if self.digests is None:
            return self
        digests = self.digests() if callable(self.digests) else self.digests
        return self._replace(header=msgspec.structs.replace(self.header, unit_digests=digests), digests=None)


class Settled(NamedTuple):
    """What became of a frame: fault is None when the peer has checked it. Every frame is settled exactly once."""

    frame: OutgoingFrame
    fault: str | None


class Arrival(NamedTuple):
    """A frame whose header is sound. payload, uint8 [num_bytes], is there if and only if fault is None: it was checked,
    and is on the device of the site.

    Whoever takes it calls done when the payload has been copied, or will not be: it may then be overwritten.
    """

    header: FrameHeader
    payload: torch.Tensor | None
    fault: ReceivingFault | None
    done: Callable[[], None] = lambda: None


class SendingTransport(Protocol):
    """The side of a prefill rank. counters: connections_x, how many were opened over transport x."""

    settled: Mailbox[Settled]

    @property
    def counters(self) -> dict[str, int]: ...

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        """Return memory for the next frame to destination, uint8 [num_bytes]; what is taken must be sent.

        It is the host's, or that of the site's device where the transport reads it there.

        None while there is none: there will be some when the next frame to destination is settled.
        """
        ...

    def send(self, frame: OutgoingFrame) -> None:
        """Take the frame; frames to one destination arrive in the order in which they were taken."""
        ...

    def drop(self, attempt: Attempt) -> None:
        """Do not send those frames of this attempt that have not begun."""
        ...

    def close_peer(self, epoch: Epoch) -> None:
        """Close every connection to the group of this epoch; its frames are settled with a fault."""
        ...

    def close(self) -> None:
        """End all threads and connections."""
        ...


class ReceivingTransport(Protocol):
    """The side of a decode rank. address is where its peers send; counters has one entry per ReceivingFault."""

    address: str
    arrivals: Mailbox[Arrival]

    @property
    def counters(self) -> dict[str, int]: ...

    def close_peer(self, epoch: Epoch) -> None:
        """Close every connection to the group of this epoch."""
        ...

    def close(self) -> None:
        """End all threads and connections."""
        ...
