"""Frames: the header that travels before every KV payload.

Used by the transports, which encode and check, and by the receiver, which compares a header with its own plan. A header
is a version byte, a digest of what follows, and a FrameHeader as MessagePack. The payload's digests, which a header
carries, are digests.py's.
"""

import struct
from typing import Annotated, Literal

import msgspec
import xxhash

from kv_transfer.plan import MAX_UNITS, Piece
from protocol.errors import UNPARSABLE, WireError
from protocol.identity import Attempt

FRAME_VERSION = 5
DIGEST_BYTES = 8
MAX_HEADER_BYTES = 1024 + 2 * MAX_UNITS * DIGEST_BYTES

FrameFault = Literal["bad_version", "bad_header", "wrong_size", "bad_digest"]

DigestKind = Literal["xxh3", "words"]

RankNumber = Annotated[int, msgspec.Meta(ge=0)]


class FrameError(WireError):
    """A frame that must not be used; fault is from a closed set and names a counter."""

    def __init__(self, fault: FrameFault, message: str) -> None:
        super().__init__(message)
        self.fault: FrameFault = fault


class FrameHeader(msgspec.Struct, frozen=True, array_like=True):
    """Which bytes of which attempt a frame carries. num_frames: the whole transfer's between these two ranks.

    digest_kind, unit_digests: the kind of the payload's digests, and the digests (digests.py). number: how many frames
    of this transfer had left for this rank before, including those that were sent again.
    """

    attempt: Attempt
    source_rank: RankNumber
    destination_rank: RankNumber
    num_frames: Annotated[int, msgspec.Meta(ge=1)]
    piece: Piece
    digest_kind: DigestKind
    unit_digests: bytes
    number: Annotated[int, msgspec.Meta(ge=0)] = 0


_prefix = struct.Struct("<BQ")  # version, digest of the rest
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(FrameHeader)


def digest_of(data: bytes | memoryview) -> int:
    """Return the 64-bit XXH3 digest: it finds damage, it does not stop a forger."""
    return xxhash.xxh3_64_intdigest(data)


def encode_header(header: FrameHeader) -> bytes:
    """Return the header as it travels."""
    body = _encoder.encode(header)
    return _prefix.pack(FRAME_VERSION, digest_of(body)) + body


def decode_header(data: bytes | memoryview) -> FrameHeader:
    """Return the header in data, or raise FrameError; nothing else is ever raised."""
    if not _prefix.size < len(data) <= MAX_HEADER_BYTES:
        raise FrameError("bad_header", f"frame header of {len(data)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    version, digest = _prefix.unpack_from(data)
    if version != FRAME_VERSION:
        raise FrameError("bad_version", f"frame has version {version}; this is version {FRAME_VERSION}")
    body = bytes(data[_prefix.size :])
    if digest_of(body) != digest:
        raise FrameError("bad_header", "frame header does not match its own digest")
    try:
        return _decoder.decode(body)
    except UNPARSABLE as error:
        raise FrameError("bad_header", f"frame header does not parse: {error}") from error
