"""Frames: the header that travels before every KV payload, and the digests that hold both together.

Used by the transports, which encode and check, and by the receiver, which compares a header with its own plan. A header
is a version byte, a digest of what follows, and a FrameHeader as MessagePack.
"""

import struct
from typing import Annotated, Literal

import msgspec
import xxhash

from kv_transfer.plan import Piece
from protocol.errors import WireError
from protocol.identity import Attempt

FRAME_VERSION = 1
MAX_HEADER_BYTES = 1024

FrameFault = Literal["bad_version", "bad_header", "wrong_size", "bad_digest"]

Rank = Annotated[int, msgspec.Meta(ge=0)]


class FrameError(WireError):
    """A frame that must not be used; fault is from a closed set and names a counter."""

    def __init__(self, fault: FrameFault, message: str) -> None:
        super().__init__(message)
        self.fault: FrameFault = fault


class FrameHeader(msgspec.Struct, frozen=True, array_like=True):
    """Whose bytes a frame carries, and which. num_frames counts those of this pair of ranks."""

    attempt: Attempt
    source_rank: Rank
    destination_rank: Rank
    num_frames: Annotated[int, msgspec.Meta(ge=1)]
    piece: Piece
    payload_digest: int


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
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError("bad_header", f"frame header does not parse: {error}") from error


def check_payload(header: FrameHeader, payload: bytes | memoryview) -> None:
    """Raise FrameError unless payload is exactly what header announces."""
    if len(payload) != header.piece.num_bytes:
        raise FrameError("wrong_size", f"payload of {len(payload)} bytes; {header.piece.num_bytes} were announced")
    if digest_of(payload) != header.payload_digest:
        raise FrameError("bad_digest", "payload does not match its digest")
