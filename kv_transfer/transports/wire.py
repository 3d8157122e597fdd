"""What two ranks say to one another after their greeting, over all transports.

The sender announces every frame: [sequence, num_bytes, slot, header]. Its payload follows at once over TCP, lies in
that slot of the sender's slab, or comes through the pair's communicator. The receiver answers [sequence, fault or
nothing] when it has looked at the payload and does not need its memory any more.
"""

import struct
from typing import NamedTuple

from kv_transfer.frames import MAX_HEADER_BYTES
from kv_transfer.plan import FRAME_BYTES

_frame = struct.Struct("<QII")
_answer = struct.Struct("<Q")

MAX_MESSAGE_BYTES = MAX_HEADER_BYTES + _frame.size
MAX_ANSWER_BYTES = 4096


class Announced(NamedTuple):
    """A frame whose payload has num_bytes. slot: of a slab; 0 elsewhere."""

    sequence: int
    num_bytes: int
    slot: int
    header: bytes


def encode_frame(frame: Announced) -> bytes:
    """Return the message as it travels."""
    return _frame.pack(frame.sequence, frame.num_bytes, frame.slot) + frame.header


def decode_frame(data: bytes) -> Announced:
    """Return what is announced. Raises ValueError when that is no frame."""
    if len(data) < _frame.size:
        raise ValueError(f"a message of {len(data)} bytes announces no frame")
    sequence, num_bytes, slot = _frame.unpack_from(data)
    if not 0 < num_bytes <= FRAME_BYTES:
        raise ValueError(f"a payload of {num_bytes} bytes is announced; a frame has 1 to {FRAME_BYTES}")
    return Announced(sequence, num_bytes, slot, data[_frame.size :])


def encode_answer(sequence: int, said: bytes) -> bytes:
    """Return the message as it travels; said is the fault of a frame, nothing when there is none."""
    return _answer.pack(sequence) + said


def decode_answer(data: bytes) -> tuple[int, bytes]:
    """Return the sequence number and what is said of it. Raises ValueError when that is no answer."""
    if len(data) < _answer.size:
        raise ValueError(f"a message of {len(data)} bytes is no answer")
    return _answer.unpack_from(data)[0], data[_answer.size :]
