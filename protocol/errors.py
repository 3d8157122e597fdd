"""The errors that pass from one part of Tandem to another, wherever they are defined.

    TandemError
     ├─ ConfigError        a topology or model that cannot work; for the person who wrote it
     │   └─ MisfitError    a well-formed value of a topology that cannot work (cluster/checks.py)
     ├─ WireError          a message or frame that does not parse or does not verify; dropped and counted
     │   ├─ VersionError   a message of another version of the control protocol
     │   └─ FrameError     the same of a KV frame, with a reason from a closed set (kv_transfer/frames.py)
     ├─ GroupError         a group that cannot assemble or lost a rank; the process ends
     ├─ DeviceError        a GPU that does not answer; the process ends
     ├─ Fenced, Stopped    the router ended this life, or all of them (worker/control_link.py)
     └─ Departed           a signal ended this life (worker/departure.py)

Within kv_transfer alone there are RefusedError and StrangerError (kv_transfer/handshake.py), within the router NoPair
and PromptTooLong (router/control/dispatch.py) and the answers that are errors (router/front/errors.py). ValueError
stays for a client's bad parameter, assert for a programmer's mistake (never on what a peer sent).
"""

from typing import Literal

import msgspec

FailureCode = Literal[
    "worker_lost",
    "worker_leaving",
    "transfer_failed",
    "kv_cache_too_small",
    "out_of_memory",
    "model_output_invalid",
    "internal_error",
    "quarantined",
]
"""Why an attempt ended without its last token. Clients see what no further attempt could mend; metrics see all."""

UNPARSABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
"""What msgspec raises for bytes that are not what was expected, nest too deep, or hold text that is no UTF-8."""


class TandemError(Exception):
    """Base of our own errors."""


class ConfigError(TandemError):
    """A topology or a model directory that cannot be served; the message says what is wrong and what would be right."""


class GroupError(TandemError):
    """A rank's group cannot be assembled, or lost a rank. Nothing can be mended: the process ends."""


class DeviceError(TandemError):
    """A device has not finished its work in time. Nothing can be mended: the process ends."""


class WireError(TandemError):
    """Bytes from a socket that are not a valid message or frame."""


class VersionError(WireError):
    """A message of another version of the protocol: not broken, but not to be understood here."""

    def __init__(self, theirs: int, ours: int) -> None:
        super().__init__(f"message has protocol version {theirs}; this is version {ours}")
        self.theirs = theirs
        self.ours = ours
