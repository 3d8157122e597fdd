"""What goes into an attempt's life and what comes out of it: events, actions, and how it may end. Plain data.

Written for lifecycle.py; attempts.py, controller.py and whoever carries actions out read it.
"""

from typing import Literal

import msgspec

from protocol.errors import FailureCode
from protocol.identity import Attempt, Epoch
from protocol.messages import (
    AnyMessage,
    Committed,
    Failed,
    Fetch,
    Grant,
    Handoff,
    PromptLogprobs,
    TokenUpdate,
    Unfetched,
)
from protocol.stages import Stage

EndCode = Literal["stop", "length", "client_gone", "client_stalled", "deadline_exceeded", "shutting_down"] | FailureCode


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended, as its client sees it. stage is FINISHED, CANCELLED or FAILED."""

    stage: Stage
    code: EndCode
    message: str = ""


# --- events -----------------------------------------------------------------------------------------------------------


Said = Grant | Fetch | Unfetched | Handoff | Committed | Failed | PromptLogprobs | TokenUpdate
"""What leaders say of attempts."""


class FromWorker(msgspec.Struct, frozen=True):
    """A message about this attempt, from the leader whose epoch is sender."""

    sender: Epoch
    message: Said


class EpochLost(msgspec.Struct, frozen=True):
    """The group whose leader had this epoch is gone, with all it held."""

    epoch: Epoch


class Cancel(msgspec.Struct, frozen=True):
    """Nobody wants the rest: the client left, a stop string was hit, the deadline passed, the router shuts down."""

    outcome: Outcome


Event = FromWorker | EpochLost | Cancel


# --- actions ----------------------------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """Send message to the rank whose epoch is receiver."""

    receiver: Epoch
    message: AnyMessage


class Deliver(msgspec.Struct, frozen=True):
    """Give this to the client. Tokens of one request come in index order, without gaps or doubles."""

    update: TokenUpdate | PromptLogprobs


class End(msgspec.Struct, frozen=True):
    """Tell the client how it ended: exactly once per attempt, after its last delivery."""

    attempt: Attempt
    outcome: Outcome


class Drop(msgspec.Struct, frozen=True):
    """A message was not acted on; count it under this reason."""

    reason: str


Action = Send | Deliver | End | Drop
