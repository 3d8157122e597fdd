"""Digests of payloads, one per unit: how they are made, and how a payload is checked against its header.

A unit is one layer of one plane of one head for UNIT_TOKENS tokens (the last of a row may have fewer), so its
digest is the same whatever the layouts of the two sides. "xxh3" is for payloads in the host's memory, "words" for those
on a GPU (kernels/plain/digest_kv.py); the header says of which kind its digests are, and every receiver can
check both. Why, and what each finds: docs/decisions/0006-digests.md.
"""

from collections.abc import Iterator

import torch

from kernels.backend import operations_for
from kernels.native.xxh3_kv import xxh3_kv
from kernels.plain.digest_kv import WORD_BYTES
from kv_transfer.frames import DIGEST_BYTES, DigestKind, FrameError, FrameHeader
from kv_transfer.plan import Piece, Rows, num_units, rows_of, unit_name


def unit_digests(kind: DigestKind, piece: Piece, payload: torch.Tensor) -> bytes:
    """Return the digests of a piece's units, 8 bytes each, plane after plane: [layers, heads, units of tokens] of each.

    payload: uint8 [num_bytes]. Waits for the device that it is on. Raises ValueError for a piece that contradicts
    itself, or that this kind cannot digest.
    """
    if kind == "xxh3":
        parts = _parts(rows_of(piece), payload.cpu())
        return b"".join(xxh3_kv(part, rows.row_bytes, rows.unit_bytes) for rows, part in parts)
    return words_digests(piece, payload).cpu().numpy().tobytes()


def words_digests(piece: Piece, payload: torch.Tensor) -> torch.Tensor:
    """Return the digests of kind "words", int64 [num_units], on the payload's device, without waiting for it.

    Raises ValueError for a piece whose rows are no whole words.
    """
    cut = rows_of(piece)
    for rows in cut:
        if rows.row_bytes % WORD_BYTES or rows.unit_bytes % WORD_BYTES:
            raise ValueError(f"rows of {rows.row_bytes} bytes are no whole words of {WORD_BYTES}")
    digest_kv = operations_for(payload.device).digest_kv
    digests = [digest_kv(part, rows.row_bytes, rows.unit_bytes) for rows, part in _parts(cut, payload)]
    return digests[0] if len(digests) == 1 else torch.cat(digests)


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


def _parts(cut: list[Rows], payload: torch.Tensor) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Yield the parts of a payload that have rows of one length; most payloads are one such part."""
    start = 0
    for rows in cut:
        yield rows, payload if len(cut) == 1 else payload[start : start + rows.num_bytes]
        start += rows.num_bytes


def _difference(header: FrameHeader, found: bytes) -> str:
    expected, units = header.unit_digests, range(0, len(found), DIGEST_BYTES)
    wrong = [at for at in units if found[at : at + DIGEST_BYTES] != expected[at : at + DIGEST_BYTES]]
    first = unit_name(header.piece, wrong[0] // DIGEST_BYTES)
    return f"{len(wrong)} of {len(units)} units do not match their digests, first {first}"
