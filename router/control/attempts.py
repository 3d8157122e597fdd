"""The table of requests: finds the attempt that an event belongs to, and follows a failed one with the next.

Pure, as lifecycle.py is: events and the time now go in, actions come out. It keeps the dispatcher's counts in step.
A request that was let in waits for a pair, within its deadline, whenever it has lost its own: its client sees a pause.
Used by controller.py.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from protocol.identity import Attempt, Epoch, new_attempt
from protocol.request import Request
from protocol.stages import Stage
from router.control.avoidance import Avoidance
from router.control.course import Course
from router.control.dispatch import Dispatcher, NoPair, PromptTooLong
from router.control.events import Action, Cancel, Drop, End, EpochLost, Event, FromWorker, Outcome, Said
from router.control.held_prefixes import HeldPrefixes
from router.control.lifecycle import Lifecycle
from router.control.policies import Pair, PairKey, ReadyGroup
from router.control.quarantine import Quarantine

TOO_LATE = Outcome(Stage.FAILED, "deadline_exceeded", "the request's deadline has passed")
LEAVING = Outcome(Stage.FAILED, "worker_leaving", "a worker of this request is leaving")


class Attempts:
    """Every request that is not over, by id. A request has one attempt at a time.

    held: where prefill is to be told what decode seems to hold, None where it does not fetch. continued: how often
    another attempt followed, by what had ended the one before. proved_s: when an answer last got through a pair, by
    epochs of prefill and decode.
    """

    def __init__(self, dispatcher: Dispatcher, vocab_size: int, held: HeldPrefixes | None = None) -> None:
        self._dispatcher = dispatcher
        self._held = held
        self._vocab_size = vocab_size
        self._courses: dict[str, Course] = {}
        self._waiting: dict[str, Course] = {}
        self._of_epoch: defaultdict[Epoch, set[str]] = defaultdict(set)
        self._quarantine = Quarantine()
        self._avoidance = Avoidance()
        self._now_s = 0.0
        self.proved_s: dict[PairKey, float] = {}
        self.continued: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._courses)

    @property
    def num_quarantined(self) -> int:
        """How many prompts are refused now."""
        return len(self._quarantine)

    def stages(self) -> list[Stage]:
        """Return the stage of every request in the table."""
        return [course.life.stage if course.life else Stage.QUEUED for course in self._courses.values()]

    def start(self, request: Request, deadline_s: float) -> list[Action]:
        """Send request to the pair that the dispatcher chooses. deadline_s: on the clock that expire is given.

        Raise NoPair, PromptTooLong or Quarantined, having done nothing, when it cannot be served now.
        """
        self._quarantine.check(request, self._now_s)
        pair = self._dispatcher.choose(request, avoided=self._avoidance.pairs(self._now_s))
        course = self._courses[request.request_id] = Course(request, deadline_s)
        return self._begin(course, pair)

    def try_out(self, pair: Pair, request: Request, deadline_s: float) -> list[Action]:
        """Send request to this pair and no other."""
        course = self._courses[request.request_id] = Course(request, deadline_s, is_tied=True)
        return self._begin(course, pair)

    def resume(self) -> list[Action]:
        """Begin the next attempt of every request that waits for one and can have it, in the order of their losses.

        Called after everything that may have brought a pair: groups that became ready, and time.
        """
        return [action for course in list(self._waiting.values()) for action in self._resume(course)]

    def receive(self, sender: Epoch, message: Said) -> list[Action]:
        """A leader said something about an attempt. What is said of attempts that are over is dropped."""
        course = self._courses.get(message.attempt.request_id)
        if course is None or course.life is None or course.attempt != message.attempt:
            return [Drop("ended_attempt")]
        return self._step(course, course.life, FromWorker(sender, message))

    def cancel(self, request_id: str, outcome: Outcome) -> list[Action]:
        """End a request for a reason of our own; nothing happens when it is over already."""
        course = self._courses.get(request_id)
        if course is None:
            return []
        if course.life is None:
            return self._end_waiting(course, outcome)
        return self._step(course, course.life, Cancel(outcome))

    def lose(self, epoch: Epoch) -> list[Action]:
        """The group of this leader's epoch is gone."""
        actions = [action for course, life in self._on(epoch) for action in self._step(course, life, EpochLost(epoch))]
        self._of_epoch.pop(epoch, None)
        self._avoidance.lose(epoch)
        for pair in [pair for pair in self.proved_s if epoch in pair]:
            del self.proved_s[pair]
        if self._held is not None:
            self._held.forget(epoch)
        return actions

    def leave(self, epoch: Epoch) -> list[Action]:
        """The group of this leader's epoch will end soon: what it holds goes on elsewhere."""
        return [
            action
            for course, life in self._on(epoch)
            if epoch in life.holding_epochs
            for action in self._step(course, life, Cancel(LEAVING))
        ]

    def expire(self, now_s: float) -> list[Action]:
        """End every request whose deadline has passed."""
        self._now_s = now_s
        self._quarantine.expire(now_s)
        return self._cancel_all((i for i, course in self._courses.items() if course.deadline_s <= now_s), TOO_LATE)

    def cancel_all(self, outcome: Outcome) -> list[Action]:
        """End every request."""
        return self._cancel_all(self._courses, outcome)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _cancel_all(self, request_ids: Iterable[str], outcome: Outcome) -> list[Action]:
        return [action for request_id in list(request_ids) for action in self.cancel(request_id, outcome)]

    def _on(self, epoch: Epoch) -> list[tuple[Course, Lifecycle]]:
        """Return what has an attempt on this group."""
        courses = [self._courses[request_id] for request_id in sorted(self._of_epoch.get(epoch, ()))]
        return [(course, course.life) for course in courses if course.life is not None]

    def _begin(self, course: Course, pair: Pair) -> list[Action]:
        request = course.request
        attempt = new_attempt(request.request_id, course.num_attempts, pair.prefill.epoch, pair.decode.epoch)
        life = Lifecycle(attempt, request, self._vocab_size)
        course.begin(life)
        for epoch in (attempt.prefill_epoch, attempt.decode_epoch):
            self._of_epoch[epoch].add(request.request_id)
        num_held_tokens = self._num_held_tokens(pair.decode, request)
        self._dispatcher.started(attempt, request)
        return life.start(pair.prefill.endpoint, pair.decode.endpoint, num_held_tokens)

    def _resume(self, course: Course) -> list[Action]:
        if course.not_before_s > self._now_s:
            return []
        avoided = self._avoidance.pairs(self._now_s)
        last = course.attempt.prefill_epoch if course.attempt else None
        try:
            pair = self._dispatcher.choose(course.request, avoided=avoided, near=last)
        except NoPair:
            return []
        except PromptTooLong as error:
            text = f"it lost its worker, and no other has room for the prompt and the answer so far: {error}"
            return self._end_waiting(course, Outcome(Stage.FAILED, "worker_lost", text))
        if course.is_suspect and self._has_suspect(pair):
            return []
        del self._waiting[course.request.request_id]
        return self._begin(course, pair)

    def _has_suspect(self, pair: Pair) -> bool:
        """Whether a suspect is on one of these groups already: a crash should say which of them it was."""
        epochs = {pair.prefill.epoch, pair.decode.epoch}
        return any(
            course.is_proving and course.attempt and not epochs.isdisjoint(course.attempt.epochs)
            for course in self._courses.values()
        )

    def _end_waiting(self, course: Course, outcome: Outcome) -> list[Action]:
        assert course.attempt is not None
        del self._waiting[course.request.request_id], self._courses[course.request.request_id]
        return [End(course.attempt, outcome)]

    def _step(self, course: Course, life: Lifecycle, event: Event) -> list[Action]:
        actions = life.step(event)
        if life.stage > Stage.PREFILLING:
            self._dispatcher.prefilled(life.attempt)
        if life.stage is Stage.DECODING:
            self._avoidance.succeeded(life.attempt)
            self.proved_s[life.attempt.epochs] = self._now_s
        if life.stage.is_end:
            self._dispatcher.ended(life.attempt)
        if life.is_over:
            self._remember(life)
            self._forget(life.attempt)
        if actions and isinstance(last := actions[-1], End) and last.outcome.stage is Stage.FAILED:
            return [*actions[:-1], *self._fail(course, last)]
        if life.is_over:
            del self._courses[life.attempt.request_id]
        return actions

    def _fail(self, course: Course, end: End) -> list[Action]:
        """An attempt has failed, and nobody holds anything for it any more: another follows, or the client is told."""
        request_id, code = course.request.request_id, end.outcome.code
        if code == "transfer_failed":
            self._avoidance.failed(end.attempt, self._now_s)
        outcome = course.fail(end.outcome, self._now_s)
        if outcome is None:
            self.continued[code] += 1
            self._waiting[request_id] = course
            return []
        if outcome.code == "quarantined":
            self._quarantine.add(course.request, self._now_s)
        del self._courses[request_id]
        return [End(end.attempt, outcome)]

    def _num_held_tokens(self, decode: ReadyGroup, request: Request) -> int:
        """Return how much of the prompt decode seems to hold; none where its grant may take a while."""
        if self._held is None or not self._dispatcher.has_room(decode, request):
            return 0
        return self._held.num_held(decode.epoch, request.salt, request.known_token_ids)

    def _remember(self, life: Lifecycle) -> None:
        """Decode has computed with every token but the last, unless the first was all there was."""
        if self._held is not None and life.num_drawn > 1:
            token_ids = (*life.request.known_token_ids, *life.token_ids[:-1])
            self._held.remember(life.attempt.decode_epoch, life.request.salt, token_ids)

    def _forget(self, attempt: Attempt) -> None:
        for epoch in attempt.epochs:
            requests = self._of_epoch.get(epoch, set())
            requests.discard(attempt.request_id)
            if not requests:
                self._of_epoch.pop(epoch, None)
