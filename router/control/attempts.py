"""The table of live attempts: finds the lifecycle that an event belongs to, and keeps the dispatcher's counts in step.

Pure, as lifecycle.py is: events and the time now go in, actions come out. Used by controller.py.
"""

from collections import defaultdict
from collections.abc import Iterable

from protocol.identity import Attempt, Epoch, new_attempt
from protocol.request import Request
from protocol.stages import Stage
from router.control.dispatch import Dispatcher
from router.control.held_prefixes import HeldPrefixes
from router.control.lifecycle import Action, Cancel, Drop, EpochLost, Event, FromWorker, Lifecycle, Outcome, Said
from router.control.policies import ReadyGroup

TOO_LATE = Outcome(Stage.FAILED, "deadline_exceeded", "the request's deadline has passed")


class Attempts:
    """Every attempt that is not over, by request id. A request has one attempt at a time.

    held: where prefill is to be told what decode seems to hold, None where it does not fetch.
    """

    def __init__(self, dispatcher: Dispatcher, vocab_size: int, held: HeldPrefixes | None = None) -> None:
        self._dispatcher = dispatcher
        self._held = held
        self._vocab_size = vocab_size
        self._lives: dict[str, Lifecycle] = {}
        self._deadlines: dict[str, float] = {}
        self._of_epoch: defaultdict[Epoch, set[str]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._lives)

    def stages(self) -> list[Stage]:
        """Return the stage of every attempt in the table."""
        return [life.stage for life in self._lives.values()]

    def start(self, request: Request, deadline_s: float) -> list[Action]:
        """Send request to the pair that the dispatcher chooses. deadline_s: on the clock that expire is given.

        Raise NoPair or PromptTooLong, having done nothing, when there is no pair for it.
        """
        pair = self._dispatcher.choose(request)
        attempt = new_attempt(request.request_id, 0, pair.prefill.epoch, pair.decode.epoch)
        life = Lifecycle(attempt, request, self._vocab_size)
        self._lives[request.request_id] = life
        self._deadlines[request.request_id] = deadline_s
        for epoch in (attempt.prefill_epoch, attempt.decode_epoch):
            self._of_epoch[epoch].add(request.request_id)
        num_held_tokens = self._num_held_tokens(pair.decode, request)
        self._dispatcher.started(attempt, request)
        return life.start(pair.prefill.endpoint, pair.decode.endpoint, num_held_tokens)

    def receive(self, sender: Epoch, message: Said) -> list[Action]:
        """A leader said something about an attempt. What is said of attempts that are over is dropped."""
        life = self._lives.get(message.attempt.request_id)
        if life is None or life.attempt != message.attempt:
            return [Drop("ended_attempt")]
        return self._step(life, FromWorker(sender, message))

    def cancel(self, request_id: str, outcome: Outcome) -> list[Action]:
        """End a request's attempt for a reason of our own; nothing happens when it is over already."""
        life = self._lives.get(request_id)
        return self._step(life, Cancel(outcome)) if life is not None else []

    def lose(self, epoch: Epoch) -> list[Action]:
        """The group of this leader's epoch is gone."""
        lives = [self._lives[request_id] for request_id in sorted(self._of_epoch.get(epoch, ()))]
        actions = [action for life in lives for action in self._step(life, EpochLost(epoch))]
        self._of_epoch.pop(epoch, None)
        if self._held is not None:
            self._held.forget(epoch)
        return actions

    def expire(self, now_s: float) -> list[Action]:
        """End every attempt whose deadline has passed."""
        return self._cancel_all((i for i, deadline in self._deadlines.items() if deadline <= now_s), TOO_LATE)

    def cancel_all(self, outcome: Outcome) -> list[Action]:
        """End every attempt."""
        return self._cancel_all(self._lives, outcome)

    def _cancel_all(self, request_ids: Iterable[str], outcome: Outcome) -> list[Action]:
        return [action for request_id in list(request_ids) for action in self.cancel(request_id, outcome)]

    def _step(self, life: Lifecycle, event: Event) -> list[Action]:
        actions = life.step(event)
        if life.stage > Stage.PREFILLING:
            self._dispatcher.prefilled(life.attempt)
        if life.stage.is_end:
            self._dispatcher.ended(life.attempt)
        if life.is_over:
            self._remember(life)
            self._forget(life.attempt)
        return actions

    def _num_held_tokens(self, decode: ReadyGroup, request: Request) -> int:
        """Return how much of the prompt decode seems to hold; none where its grant may take a while."""
        if self._held is None or not self._dispatcher.has_room(decode, request):
            return 0
        return self._held.num_held(decode.epoch, request.salt, request.prompt_token_ids)

    def _remember(self, life: Lifecycle) -> None:
        """Decode has computed with every token but the last, unless the first was all there was."""
        if self._held is not None and life.num_tokens > 1:
            token_ids = (*life.request.prompt_token_ids, *life.token_ids[:-1])
            self._held.remember(life.attempt.decode_epoch, life.request.salt, token_ids)

    def _forget(self, attempt: Attempt) -> None:
        del self._lives[attempt.request_id]
        del self._deadlines[attempt.request_id]
        for epoch in (attempt.prefill_epoch, attempt.decode_epoch):
            requests = self._of_epoch.get(epoch, set())
            requests.discard(attempt.request_id)
            if not requests:
                self._of_epoch.pop(epoch, None)
