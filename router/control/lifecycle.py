"""One attempt's life as a pure state machine: step(event) -> actions. No sockets, no tasks, no clocks.

It knows which side still holds blocks for the attempt, relays between prefill and decode while the attempt lives, hands
tokens to the client in order, and makes sure that whoever holds something when the attempt ends is told to drop it.
Used by attempts.py, which keeps the table of them.
"""

from enum import Enum
from typing import get_args

from protocol.errors import FailureCode
from protocol.identity import Attempt, Epoch
from protocol.layout import Endpoint
from protocol.messages import (
    Abort,
    Committed,
    Failed,
    Fetch,
    Grant,
    Handoff,
    Prefill,
    PromptLogprobs,
    Reserve,
    TokenUpdate,
    Unfetched,
)
from protocol.request import Request
from protocol.stages import Stage
from router.control.events import (
    Action,
    Cancel,
    Deliver,
    Drop,
    End,
    EpochLost,
    Event,
    FromWorker,
    Outcome,
    Said,
    Send,
)


class Side(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


_OUTSIDE = "log probabilities of what is outside the vocabulary"
_COMPUTING = {Stage.PREFILLING: Side.PREFILL, Stage.DECODING: Side.DECODE}


class Lifecycle:
    """One attempt, from its start until it has ended for the client and nobody holds anything for it.

    was_computed_on: whether a group that was lost may have been computing it just then, and not only have held it.
    """

    def __init__(self, attempt: Attempt, request: Request, vocab_size: int) -> None:
        self.attempt = attempt
        self.request = request
        self.stage = Stage.QUEUED
        self.holders: set[Side] = set()
        self.token_ids: list[int] = []
        self._vocab_size = vocab_size
        self._first_index = len(request.generated_token_ids)
        self._first_token_id: int | None = None
        self._is_granted = False
        self._is_fetched = False
        self._is_handed_off = False
        self.was_computed_on = False

    @property
    def num_drawn(self) -> int:
        """How many tokens this attempt has brought."""
        return len(self.token_ids)

    @property
    def next_index(self) -> int:
        """The place of the next token in the whole answer."""
        return len(self.request.generated_token_ids) + len(self.token_ids)

    @property
    def holding_epochs(self) -> set[Epoch]:
        """The groups that hold something for it."""
        return {self._epoch_of(side) for side in self.holders}

    @property
    def is_over(self) -> bool:
        """Ended for the client, and no block anywhere is held for it."""
        return self.stage.is_end and not self.holders

    def start(self, source: Endpoint, destination: Endpoint, num_held_tokens: int = 0) -> list[Action]:
        """Ask both sides at once: decode for room, prefill for the computation. num_held_tokens: see Prefill."""
        self.stage = Stage.PREFILLING
        self.holders = {Side.PREFILL, Side.DECODE}
        return [
            Send(self.attempt.decode_epoch, Reserve(self.attempt, self.request, source)),
            Send(self.attempt.prefill_epoch, Prefill(self.attempt, self.request, destination, num_held_tokens)),
        ]

    def step(self, event: Event) -> list[Action]:
        """Return what is to be done about event, in order. Nothing but this and start changes the state."""
        match event:
            case FromWorker(sender, message):
                return self._hear(sender, message)
            case EpochLost(epoch):
                return self._lose(epoch)
            case Cancel(outcome):
                return self._end(outcome)

    def _hear(self, sender: Epoch, message: Said) -> list[Action]:
        if sender not in self._senders(message):
            return [Drop("wrong_sender")]
        match message:
            case Grant():
                return self._granted(message)
            case Fetch():
                return self._fetched(message)
            case Unfetched():
                return self._unfetched(message)
            case Handoff():
                return self._handed_off(message)
            case Committed():
                return self._committed(message)
            case Failed():
                return self._failed(sender, message)
            case PromptLogprobs():
                return self._prompt_logprobs(message)
            case TokenUpdate():
                return self._token(message)

    def _senders(self, message: Said) -> tuple[Epoch, ...]:
        prefill, decode = self.attempt.prefill_epoch, self.attempt.decode_epoch
        match message:
            case Failed():
                return prefill, decode
            case Fetch() | Handoff() | PromptLogprobs():
                return (prefill,)
            case TokenUpdate(index=index) if index == self._first_index:
                return (prefill,)
            case _:
                return (decode,)

    def _granted(self, message: Grant) -> list[Action]:
        if self._is_granted or self.stage.is_end:
            return self._violation("a second grant, or one after the end")
        self._is_granted = True
        return [Send(self.attempt.prefill_epoch, message)]

    def _fetched(self, message: Fetch) -> list[Action]:
        if self._is_fetched or not self._is_granted or self._is_handed_off or self.stage.is_end:
            return self._violation("a fetch without a grant, or a second one, or one after the handoff or the end")
        self._is_fetched = True
        return [Send(self.attempt.decode_epoch, message)]

    def _unfetched(self, message: Unfetched) -> list[Action]:
        """Prefill may have given up by itself, and have nothing left by now."""
        if not self._is_fetched:
            return self._violation("an answer to a fetch that nobody asked for")
        return [Send(self.attempt.prefill_epoch, message)] if Side.PREFILL in self.holders else []

    def _handed_off(self, message: Handoff) -> list[Action]:
        if self._is_handed_off or not self._is_granted or self.stage.is_end:
            return self._violation("a handoff without a grant, or a second one")
        if not self._is_token(message.first_token_id):
            return self._violation(f"a handoff with token id {message.first_token_id}, which is outside the vocabulary")
        if self._first_token_id not in (None, message.first_token_id):
            return self._violation("a handoff whose first token is not the one that the client got")
        self._is_handed_off = True
        self._first_token_id = message.first_token_id
        return [Send(self.attempt.decode_epoch, message)]

    def _committed(self, message: Committed) -> list[Action]:
        if not self._is_handed_off or Side.PREFILL not in self.holders:
            return self._violation("a commit without a handoff, or a second one")
        self.holders.discard(Side.PREFILL)
        if not self.stage.is_end:
            self.stage = Stage.DECODING
        return [Send(self.attempt.prefill_epoch, message)]

    def _prompt_logprobs(self, message: PromptLogprobs) -> list[Action]:
        end = message.first_position + len(message.logprobs)
        is_due = self.request.has_prompt_logprobs and self.stage is Stage.PREFILLING
        ids = (token_id for logprobs in message.logprobs for token_id in logprobs.top_token_ids)
        if not is_due or not 1 <= message.first_position < end <= len(self.request.prompt_token_ids):
            return self._violation("log probabilities of a prompt that nobody asked for, or of what is no part of it")
        return [Deliver(message)] if all(map(self._is_token, ids)) else self._violation(_OUTSIDE)

    def _token(self, update: TokenUpdate) -> list[Action]:
        problem = self._token_problem(update)
        if problem is not None:
            return self._violation(problem)
        self.token_ids.append(update.token_id)
        if update.index == self._first_index:
            self._first_token_id = update.token_id
            self.stage = max(self.stage, Stage.TRANSFERRING)
        if update.finish_reason is None:
            return [Deliver(update)]
        self.holders.discard(Side.PREFILL if update.index == self._first_index else Side.DECODE)
        return [Deliver(update), *self._finish(Outcome(Stage.FINISHED, update.finish_reason))]

    def _token_problem(self, update: TokenUpdate) -> str | None:
        if self.stage.is_end:
            return "a token after the last one"
        if update.index != self.next_index:
            return f"token {update.index} where token {self.next_index} was due"
        if update.index >= self.request.sampling.max_tokens:
            return f"more than the {self.request.sampling.max_tokens} tokens that were asked for"
        if not self._is_token(update.token_id):
            return f"token id {update.token_id}, which is outside the vocabulary"
        if update.logprobs is not None and not all(map(self._is_token, update.logprobs.top_token_ids)):
            return _OUTSIDE
        if not 0 <= update.num_cached_tokens <= (0 if update.index else len(self.request.prompt_token_ids)):
            return f"token {update.index} with {update.num_cached_tokens} cached tokens"
        if update.index == self._first_index:
            is_same = self._first_token_id in (None, update.token_id)
            return None if is_same else "a first token that is not the one in the handoff"
        return None if self._is_handed_off else "a token from decode before the handoff"

    def _is_token(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size

    def _failed(self, sender: Epoch, message: Failed) -> list[Action]:
        self.holders.discard(Side.PREFILL if sender == self.attempt.prefill_epoch else Side.DECODE)
        if self.stage.is_end:
            return []
        code: FailureCode = message.code if message.code in get_args(FailureCode) else "internal_error"  # type: ignore[assignment]
        return self._end(Outcome(Stage.FAILED, code, message.message))

    def _lose(self, epoch: Epoch) -> list[Action]:
        lost = {side for side in self.holders if self._epoch_of(side) == epoch}
        if not lost:
            return []  # prefill may go once decode has committed: the stream does not need it any more
        self.holders -= lost
        if self.stage.is_end:
            return []
        self.was_computed_on = _COMPUTING.get(self.stage) in lost
        sides = " and ".join(sorted(side.value for side in lost))
        return self._end(Outcome(Stage.FAILED, "worker_lost", f"the {sides} worker of this request was lost"))

    def _violation(self, problem: str) -> list[Action]:
        """A worker broke the protocol: whatever it would say next about this attempt cannot be trusted."""
        dropped = Drop("out_of_order")
        if self.stage.is_end:
            return [dropped]
        return [dropped, *self._end(Outcome(Stage.FAILED, "internal_error", f"a worker sent {problem}"))]

    def _finish(self, outcome: Outcome) -> list[Action]:
        """All tokens are out. Prefill may still hold blocks until decode has committed: then that is awaited."""
        is_decoded = Side.DECODE not in self.holders
        return self._end(outcome, keep={Side.PREFILL} if is_decoded else set())

    def _end(self, outcome: Outcome, keep: set[Side] | None = None) -> list[Action]:
        kept = self.holders & (keep or set())
        told = {self._epoch_of(side) for side in self.holders - kept}
        self.holders = kept
        actions: list[Action] = [Send(epoch, Abort(self.attempt)) for epoch in sorted(told)]
        if not self.stage.is_end:
            self.stage = outcome.stage
            actions.append(End(self.attempt, outcome))
        return actions

    def _epoch_of(self, side: Side) -> Epoch:
        return self.attempt.prefill_epoch if side is Side.PREFILL else self.attempt.decode_epoch
