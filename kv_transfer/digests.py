"""Digests of payloads, one per unit: how they are made, and how a payload is checked against its header.

A unit is one layer's keys or values of one KV head for UNIT_TOKENS tokens (the last of a row may have fewer), so its
digest is the same whatever the layouts of the two sides. "xxh3" is for payloads in the host's memory, "words" for those
on a GPU (kernels/plain/digest_kv.py); the header says of which kind its digests are, and every receiver can
check both. Why, and what each finds: docs/decisions/0006-digests.md.
"""

import torch

from kernels.backend import operations_for
from kernels.native.xxh3_kv import xxh3_kv
from kernels.plain.digest_kv import WORD_BYTES
from kv_transfer.frames import DIGEST_BYTES, DigestKind, FrameError, FrameHeader
from kv_transfer.plan import Piece, num_units, row_and_unit_bytes, unit_name


def unit_digests(kind: DigestKind, piece: Piece, payload: torch.Tensor) -> bytes:
    """Return the digests of a piece's units, 8 bytes each, in the order of [layers, 2, heads, units of tokens].

    payload: uint8 [num_bytes]. Waits for the device that it is on. Raises ValueError for a piece that contradicts
    itself, or that this kind cannot digest.
    """
    if kind == "xxh3":
        return xxh3_kv(payload.cpu(), *row_and_unit_bytes(piece))
    return words_digests(piece, payload).cpu().numpy().tobytes()


def words_digests(piece: Piece, payload: torch.Tensor) -> torch.Tensor:
    """Return the digests of kind "words", int64 [num_units], on the payload's device, without waiting for it.

    Raises ValueError for a piece whose rows are no whole words.
    """
    row_bytes, unit_bytes = row_and_unit_bytes(piece)
    if row_bytes % WORD_BYTES or unit_bytes % WORD_BYTES:
        raise ValueError(f"rows of {row_bytes} bytes are no whole words of {WORD_BYTES}")
    return operations_for(payload.device).digest_kv(payload, row_bytes, unit_bytes)


def check_payload(header: FrameHeader, payload: torch.Tensor) -> None:
    """Raise FrameError unless payload, uint8 [num_bytes], is exactly what header announces."""
    check_size(header, payload)
    try:
        found = unit_digests(header.digest_kind, header.piece, payload)
    except ValueError as error:
        raise FrameError("bad_header", f"frame header contradicts itself: {error}") from error
    if found != header.unit_digests:
        raise FrameError("bad_digest", _difference(header, found))


def check_size(header: FrameHeader, payload: torch.Tensor) -> None:
    """Raise FrameError unless payload has as many bytes as header announces, and header a digest for each unit."""
    piece = header.piece
    if len(payload) != piece.num_bytes:
        raise FrameError("wrong_size", f"payload of {len(payload)} bytes; {piece.num_bytes} were announced")
    try:
        if len(header.unit_digests) != num_units(piece) * DIGEST_BYTES:
            raise ValueError(f"{len(header.unit_digests)} bytes of digests for {num_units(piece)} units")
    except ValueError as error:
        raise FrameError("bad_header", f"frame header contradicts itself: {error}") from error


def _difference(header: FrameHeader, found: bytes) -> str:
    expected, units = header.unit_digests, range(0, len(found), DIGEST_BYTES)
    wrong = [at for at in units if found[at : at + DIGEST_BYTES] != expected[at : at + DIGEST_BYTES]]
    first = unit_name(header.piece, wrong[0] // DIGEST_BYTES)
    return f"{len(wrong)} of {len(units)} units do not match their digests, first {first}"
