"""What the two ends of shm and cuda_ipc say to one another, over one Unix socket per pair that keeps packets apart.

First the sender's slab, as a descriptor beside its Hello, and back an answer [GREETING, why it is refused or nothing].
Then for every frame a packet [sequence, slot, num_bytes, header], and back an answer [sequence, fault or nothing] when
the slot may be used again. Used by sender.py and receiver.py.
"""

import socket
import struct
from typing import NamedTuple

import msgspec

from kv_transfer.frames import MAX_HEADER_BYTES
from protocol.errors import UNPARSABLE

HELLO = b"tandem-kv-2"
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


class Reach(NamedTuple):
    """One end of a transport through shared memory: its name, where its own memory is, and which places it reaches."""

    scheme: str
    place: str
    reachable: frozenset[str]

    def address_of(self, listener: socket.socket) -> str:
        """Return where a listener of this end is found: its place and its name, which no file system holds."""
        return f"{self.scheme}://{self.place}/{listener.getsockname()[1:].decode()}"

    def name_at(self, address: str) -> bytes:
        """Return the name to connect to. Raises ValueError for an address that this end cannot reach."""
        place, _, name = address.removeprefix(f"{self.scheme}://").rpartition("/")
        if not address.startswith(f"{self.scheme}://") or not name:
            raise ValueError(f"not an address of the {self.scheme} transport")
        if not place or place not in self.reachable:
            where = f"{place}, which {self.scheme} does not reach from {self.place}"
            raise ValueError(f"the receiver is on another host or GPU, {where}")
        return b"\0" + name.encode()

    def reaches(self, address: str) -> bool:
        """Return whether this end can connect to that address."""
        try:
            return bool(self.name_at(address))
        except ValueError:
            return False


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """A sender's first packet, beside the descriptor of its slab."""

    greeting: bytes
    slab: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Hello)


def new_socket() -> socket.socket:
    """Return a socket that keeps packets apart and never blocks."""
    unconnected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    unconnected.setblocking(False)
    return unconnected


def encode_hello(hello: Hello) -> bytes:
    """Return the packet as it travels."""
    return HELLO + _encoder.encode(hello)


def decode_hello(data: bytes) -> Hello:
    """Return the packet in data, or raise ValueError."""
    if not data.startswith(HELLO):
        raise ValueError("a connection that does not begin with a slab")
    try:
        return _decoder.decode(data[len(HELLO) :])
    except UNPARSABLE as error:
        raise ValueError(f"a hello that does not parse: {error}") from error


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
