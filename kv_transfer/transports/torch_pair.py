"""One pair of ranks and its communicator: how a sending and a receiving rank open a process group of exactly two.

On the wire, through ZMQ: [OPEN, pair id, Announcement] once, then [FRAME, pair id, header] before every payload, which
goes through the process group. Used by torch_sender.py and torch_receiver.py.
"""

import msgspec
import torch.distributed as dist

from kernels.process_group import open_group, open_store
from protocol.errors import WireError
from protocol.identity import Epoch

OPEN = b"open"
FRAME = b"frame"
SENDER, RECEIVER = 0, 1
"""Ranks within a pair's group."""


class Announcement(msgspec.Struct, frozen=True, array_like=True):
    """Sender -> receiver: I wait for you at this store. Replaces any earlier pair of the same rank and epoch."""

    source_epoch: Epoch
    source_rank: int
    host: str
    port: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Announcement)


def encode_announcement(announcement: Announcement) -> bytes:
    """Return the announcement as MessagePack."""
    return _encoder.encode(announcement)


def decode_announcement(data: bytes | memoryview) -> Announcement:
    """Return the announcement in data, or raise WireError."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"announcement does not parse: {error}") from error


def join_pair(announcement: Announcement, host: str, timeout_s: float) -> dist.ProcessGroup:
    """Open the receiving end of an announced pair. Raises RuntimeError when the sender cannot be reached in time."""
    store = open_store(announcement.host, announcement.port, is_server=False, timeout_s=timeout_s)
    return open_group(store, RECEIVER, 2, host, "cpu", timeout_s)
