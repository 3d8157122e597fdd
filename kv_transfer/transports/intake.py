"""What becomes of a frame that has arrived as bytes: checked, and delivered to the main thread or refused.

Used by zmq_receiver.py on its thread, and by a simulator. Knows nothing of which transfers are live.
"""

import torch

from kv_transfer.frames import FrameError, FrameHeader, check_payload, decode_header
from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.transport import Arrival, ReceivingFault


def accept(header_bytes: memoryview, payload: memoryview, arrivals: Mailbox[Arrival]) -> ReceivingFault | None:
    """Deliver a sound frame, and one of which only the payload is bad; return its fault."""
    header: FrameHeader | None = None
    try:
        header = decode_header(header_bytes)
        check_payload(header, payload)
    except FrameError as error:
        if header is not None:
            arrivals.put(Arrival(header, None, error.fault))
        return error.fault
    arrivals.put(Arrival(header, _as_tensor(payload), None), len(payload))
    return None


def _as_tensor(payload: memoryview) -> torch.Tensor:
    """Return payload as uint8 [num_bytes].

    Small messages lie anywhere in ZMQ's buffer; they are moved to where every element type may be read.
    """
    flat = torch.frombuffer(payload, dtype=torch.uint8)
    return flat if flat.data_ptr() % 16 == 0 else flat.clone()
