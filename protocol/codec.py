"""Messages <-> bytes: MessagePack into checked types, no pickle, with a size limit.

The only place that encodes or decodes control messages. Decoding returns an Envelope or raises WireError, nothing else.
A message of another version is told from one that is broken, whatever that version's messages look like.
"""

import msgspec

from protocol.errors import UNPARSABLE, VersionError, WireError
from protocol.identity import Epoch
from protocol.messages import PROTOCOL_VERSION, AnyMessage, Envelope

MAX_MESSAGE_BYTES = 16 << 20
"""A prompt of a million token ids is 5 MB; nothing on the control plane is larger than a few of these."""
MAX_REPORT_BYTES = 128 << 10
"""What ranks say, to the router or to their leader, does not grow with prompts; the most is a full Tokens, 256 of 442
bytes with 20 logprobs each. Strangers can make the other end keep so much for as long as a handshake may last."""


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """The part of an Envelope that is the same in every version."""

    version: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)
_head_decoder = msgspec.msgpack.Decoder(_Head)


def encode(message: AnyMessage, sender_epoch: Epoch, receiver_epoch: Epoch = 0) -> bytes:
    """Return the message in its envelope, as MessagePack."""
    return _encoder.encode(Envelope(PROTOCOL_VERSION, sender_epoch, receiver_epoch, message))


def decode(data: bytes | memoryview) -> Envelope:
    """Return the envelope in data, or raise WireError that says what is wrong: VersionError for another version."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are accepted")
    try:
        envelope = _decoder.decode(data)
    except UNPARSABLE as error:
        _check_version(data)
        raise WireError(f"message does not parse: {error}") from error
    if envelope.version != PROTOCOL_VERSION:
        raise VersionError(envelope.version, PROTOCOL_VERSION)
    return envelope


def _check_version(data: bytes | memoryview) -> None:
    try:
        version = _head_decoder.decode(data).version
    except UNPARSABLE:
        return
    if version != PROTOCOL_VERSION:
        raise VersionError(version, PROTOCOL_VERSION)
