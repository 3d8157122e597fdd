"""One pair of ranks and its communicator: how a sending and a receiving rank open a process group of exactly two.

On the wire, through ZMQ: [OPEN, pair id, Announcement] once, then [FRAME, pair id, header] before every payload, which
goes through the process group and is answered there. Used by torch_sender.py and torch_receiver.py.
"""

import msgspec
import torch
import torch.distributed as dist

from kernels.process_group import open_group, open_store
from kv_transfer.transports.transport import RECEIVING_FAULTS, REFUSED, ReceivingFault
from protocol.errors import WireError
from protocol.identity import Epoch

OPEN = b"open"
FRAME = b"frame"
SENDER, RECEIVER = 0, 1
"""Ranks within a pair's group."""
PAYLOAD, ANSWER = 0, 1
"""Tags: a payload, and the single byte that answers it."""


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


def encode_answer(fault: ReceivingFault | None) -> torch.Tensor:
    """Return the answer to a payload, uint8 [1]: 0, or 1 + the index of the fault."""
    return torch.tensor([RECEIVING_FAULTS.index(fault) + 1 if fault else 0], dtype=torch.uint8)


def decode_answer(answer: torch.Tensor) -> str | None:
    """Return what the receiver says is wrong with a payload; None when nothing is."""
    code = int(answer[0])
    if not code:
        return None
    return REFUSED + (RECEIVING_FAULTS[code - 1] if code <= len(RECEIVING_FAULTS) else "unknown fault")


def join_pair(announcement: Announcement, host: str, timeout_s: float) -> dist.ProcessGroup:
    """Open the receiving end of an announced pair. Raises RuntimeError when the sender cannot be reached in time."""
    store = open_store(announcement.host, announcement.port, is_server=False, timeout_s=timeout_s)
    return open_group(store, RECEIVER, 2, host, "cpu", timeout_s)
