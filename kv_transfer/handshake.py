"""What a sending rank says of itself before its first frame, and why a receiving rank may refuse it.

Used by all transports when they open a connection. Both leaders have compared layouts before; here the two ranks
themselves do, so that no mistake in between can let frames of one layout into a cache of another.
"""

import msgspec

from kv_transfer.frames import FRAME_VERSION
from kv_transfer.plan import plan_transfer
from protocol.errors import UNPARSABLE
from protocol.layout import KVLayout

MAX_GREETING_BYTES = 1024

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(KVLayout)


def greeting(layout: KVLayout) -> bytes:
    """Return the greeting of a rank of a group with this layout: a version byte, and the layout as MessagePack."""
    return bytes([FRAME_VERSION]) + _encoder.encode(layout)


def refusal(ours: KVLayout, data: bytes | memoryview) -> str:
    """Return why the rank that greets so may not send KV to one of layout ours, with both values; "" when it may."""
    if not len(data) or len(data) > MAX_GREETING_BYTES:
        return f"a greeting of {len(data)} bytes; one has 1 to {MAX_GREETING_BYTES}"
    if data[0] != FRAME_VERSION:
        return f"version of KV transfer differs: sender {data[0]}, receiver {FRAME_VERSION}"
    try:
        plan_transfer(_decoder.decode(data[1:]), ours)
    except UNPARSABLE as error:
        return f"a greeting that does not parse: {error}"
    except ValueError as error:
        return str(error)
    return ""
