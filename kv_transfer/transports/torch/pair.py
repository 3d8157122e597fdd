"""What the two ends of the torch transports say to one another beside payloads, through one ZMQ connection per pair.

Sender -> receiver: [OPEN, Announcement] once, then [FRAME, sequence, num_bytes, header] before every payload, which
goes through the pair's communicator. Receiver -> sender: [sequence, fault or nothing]; and before all that, through
the sender's store, whether it is welcome. Used by sender.py and receiver.py.
"""

import struct

import msgspec

from protocol.errors import UNPARSABLE, WireError
from protocol.identity import Epoch

OPEN = b"open"
FRAME = b"frame"
VERDICT_KEY = "verdict"
WELCOME = "welcome"
"""In the sender's store; any other verdict says why it was refused."""

_num_bytes = struct.Struct("<I")


class Announcement(msgspec.Struct, frozen=True, array_like=True):
    """Sender -> receiver: I wait for you at this store. Replaces any earlier pair of the same rank and epoch."""

    source_epoch: Epoch
    source_rank: int
    host: str
    port: int
    greeting: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Announcement)


def encode_announcement(announcement: Announcement) -> bytes:
    """Return the announcement as MessagePack."""
    return _encoder.encode(announcement)


def decode_announcement(data: bytes | memoryview) -> Announcement:
    """Return the announcement in data, or raise WireError."""
    try:
        return _decoder.decode(data)
    except UNPARSABLE as error:
        raise WireError(f"announcement does not parse: {error}") from error


def encode_size(num_bytes: int) -> bytes:
    """Return the size of a payload as it is announced."""
    return _num_bytes.pack(num_bytes)


def decode_size(data: bytes, most: int) -> int:
    """Return the size of the payload that will come, or raise WireError when it is none up to most."""
    num_bytes: int = _num_bytes.unpack(data)[0] if len(data) == _num_bytes.size else 0
    if not 0 < num_bytes <= most:
        raise WireError(f"a payload of {num_bytes} bytes is announced; a frame has 1 to {most}")
    return num_bytes
