"""Frames: the header that travels before every KV payload, and the digests that hold both together.

Used by the transports, which encode and check, and by the receiver, which compares a header with its own plan. A header
is a version byte, a digest of what follows, and a FrameHeader as MessagePack. Why digests are per unit is told in
docs/decisions/0006-digests.md.
"""

import struct
from typing import Annotated, Literal

import msgspec
import xxhash

from kv_transfer.plan import MAX_UNITS, Piece, num_units, row_and_unit_bytes, unit_name
from protocol.errors import WireError
from protocol.identity import Attempt

FRAME_VERSION = 2
DIGEST_BYTES = 8
MAX_HEADER_BYTES = 1024 + 2 * MAX_UNITS * DIGEST_BYTES

FrameFault = Literal["bad_version", "bad_header", "wrong_size", "bad_digest"]

Rank = Annotated[int, msgspec.Meta(ge=0)]


class FrameError(WireError):
    """A frame that must not be used; fault is from a closed set and names a counter."""

    def __init__(self, fault: FrameFault, message: str) -> None:
        super().__init__(message)
        self.fault: FrameFault = fault


class FrameHeader(msgspec.Struct, frozen=True, array_like=True):
    """Whose bytes a frame carries, and which. num_frames counts those of this pair of ranks.

    unit_digests: see the function of that name.
    """

    attempt: Attempt
    source_rank: Rank
    destination_rank: Rank
    num_frames: Annotated[int, msgspec.Meta(ge=1)]
    piece: Piece
    unit_digests: bytes


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


def unit_digests(piece: Piece, payload: memoryview) -> bytes:
    """Return the digests of a piece's units, little-endian, in the order of [layers, 2, heads, units of tokens].

    A unit is one layer's keys or values of one KV head for UNIT_TOKENS tokens (the last of a row may have fewer), so
    its digest is the same whatever the layouts of the two sides. Raises ValueError for a piece that contradicts itself.
    """
    row_bytes, unit_bytes = row_and_unit_bytes(piece)
    rows = (payload[start : start + row_bytes] for start in range(0, piece.num_bytes, row_bytes))
    starts = range(0, row_bytes, unit_bytes)
    digests = [xxhash.xxh3_64_intdigest(row[start : start + unit_bytes]) for row in rows for start in starts]
    return struct.pack(f"<{len(digests)}Q", *digests)


def check_payload(header: FrameHeader, payload: memoryview) -> None:
    """Raise FrameError unless payload is exactly what header announces."""
    piece = header.piece
    if len(payload) != piece.num_bytes:
        raise FrameError("wrong_size", f"payload of {len(payload)} bytes; {piece.num_bytes} were announced")
    try:
        if len(header.unit_digests) != num_units(piece) * DIGEST_BYTES:
            raise ValueError(f"{len(header.unit_digests)} bytes of digests for {num_units(piece)} units")
        found = unit_digests(piece, payload)
    except ValueError as error:
        raise FrameError("bad_header", f"frame header contradicts itself: {error}") from error
    if found != header.unit_digests:
        units = range(0, len(found), DIGEST_BYTES)
        wrong = [at for at in units if found[at : at + DIGEST_BYTES] != header.unit_digests[at : at + DIGEST_BYTES]]
        text = f"{len(wrong)} of {len(units)} units do not match their digests, first {unit_name(piece, wrong[0] // 8)}"
        raise FrameError("bad_digest", text)
