"""What the two ends of the shm transport say to one another, over one Unix socket per pair that keeps packets apart.

First the sender's slab, as a descriptor beside HELLO and its greeting, and back an answer [GREETING, why it is refused
or nothing]. Then for every frame a packet [sequence, slot, num_bytes, header], and back an answer [sequence, fault or
nothing] when the slot may be used again. Used by shm_sender.py and
shm_receiver.py.
"""

import socket
import struct
from typing import NamedTuple

from kv_transfer.frames import MAX_HEADER_BYTES
from kv_transfer.transports.host_identity import host_identity

HELLO = b"tandem-kv-1"
GREETING = 2**64 - 1
"""In place of a frame's sequence number."""

MAX_PACKET_BYTES = MAX_HEADER_BYTES + 64

_frame = struct.Struct("<QII")
_answer = struct.Struct("<Q")


class FramePacket(NamedTuple):
    """Sender -> receiver: the payload lies in the first num_bytes of this slot."""

    sequence: int
    slot: int
    num_bytes: int
    header: bytes


def new_socket() -> socket.socket:
    """Return a socket that keeps packets apart and never blocks."""
    unconnected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    unconnected.setblocking(False)
    return unconnected


def address_of(listener: socket.socket) -> str:
    """Return where a listener is found: its host's identity and its name, which no file system holds."""
    return f"shm://{host_identity()}/{listener.getsockname()[1:].decode()}"


def is_reachable(address: str) -> bool:
    """Return whether this is the address of a receiver on this host."""
    try:
        return bool(name_at(address))
    except ValueError:
        return False


def name_at(address: str) -> bytes:
    """Return the name to connect to. Raises ValueError for an address that this host cannot reach."""
    host, _, name = address.removeprefix("shm://").rpartition("/")
    if not address.startswith("shm://") or not name:
        raise ValueError("not an address of the shm transport")
    if host != host_identity():
        raise ValueError("the receiver is on another host, where shared memory does not reach")
    return b"\0" + name.encode()


def encode_frame(packet: FramePacket) -> bytes:
    """Return the packet as it travels."""
    return _frame.pack(packet.sequence, packet.slot, packet.num_bytes) + packet.header


def decode_frame(data: bytes) -> FramePacket:
    """Return the packet in data, or raise ValueError."""
    if len(data) < _frame.size:
        raise ValueError(f"a frame packet of {len(data)} bytes")
    sequence, slot, num_bytes = _frame.unpack_from(data)
    return FramePacket(sequence, slot, num_bytes, data[_frame.size :])


def encode_answer(sequence: int, fault: str) -> bytes:
    """Return the answer as it travels; fault is "" when there is none."""
    return _answer.pack(sequence) + fault.encode()


def decode_answer(data: bytes) -> tuple[bytes, bytes]:
    """Return the sequence number, as bytes, and the fault."""
    return data[: _answer.size], data[_answer.size :]
