"""A cluster so small that everything that can happen to it can be tried: one prefill and one decode group of a rank.

Production code: both roles, pools, step loops, the inbox and outbox, the router's attempts, lifecycles and dispatcher.
Abstracted, so that a state can be copied and compared: caches are dictionaries from slot to (token, position), a
transfer is one frame per token, and of membership only this much is left: which epoch lives, and which the router has
yet to find out about. What was queued for one life is delivered to the next one and refused there by its epoch.
"""

from collections import deque
from collections.abc import Iterable

from protocol.identity import Attempt, Epoch
from protocol.messages import AnyMessage, PeerLost, Prefill, Reserve, Tokens, TokenUpdate
from protocol.request import Request
from protocol.stages import Stage
from router.control.attempts import Attempts
from router.control.course import Course
from router.control.dispatch import Dispatcher
from router.control.events import Action, Deliver, End, Outcome, Send
from router.control.lifecycle import Lifecycle
from router.control.policies import POLICIES, ReadyGroup
from tests.simulation.copies import Part
from tests.simulation.small_life import (
    KV,
    LONG_REQUESTS,
    REQUESTS,
    VOCAB_SIZE,
    Arbitrary,
    Life,
    Limits,
    Violation,
    endpoint_of,
    expected_tokens,
    life_key,
    request_of,
)

GONE = Outcome(Stage.CANCELLED, "client_gone")
Event = tuple[str, int]


class SmallWorld:
    """Requests, both groups, the router between them, and everything under way. An event is (name, index)."""

    def __init__(
        self,
        num_requests: int,
        limits: Limits,
        num_crashes: tuple[int, int] = (0, 0),
        num_cancels: int = 0,
        requests: dict[str, Request] = REQUESTS,
    ):
        self.sizes = (limits, 1 if requests is LONG_REQUESTS else 16)
        self.lives = [Part(Life(10 * side + 10, side == 0, *self.sizes), life_key) for side in (0, 1)]
        self.down: list[deque[tuple[Epoch, AnyMessage]]] = [deque(), deque()]
        self.up: list[deque[tuple[Epoch, AnyMessage]]] = [deque(), deque()]
        self.frames: list[tuple[Attempt, int, KV]] = []
        self.known = [10, 20]  # the epochs that the router believes in
        self.crashes_left = list(num_crashes)
        self.cancels_left = num_cancels
        self.waiting = list(requests)[:num_requests]
        self.tokens: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        dispatcher = Dispatcher(POLICIES["round_robin"])
        self.router = Part((Attempts(dispatcher, VOCAB_SIZE), dispatcher), _router_key)
        self._pair_up()

    # --- what can happen ----------------------------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """Return what can happen of itself, and what goes wrong."""
        possible: list[Event] = [("start", 0)] if self.waiting else []
        for side in (0, 1):
            possible += [("hear", side)] if self.up[side] else []
            possible += [("deliver", side)] if self.down[side] else []
            possible += [("report", side)] if self.lives[side].item.reports else []
            possible += [("notice", side)] if self.known[side] != self.lives[side].item.epoch else []
            role = self.lives[side].item.role
            possible += [("step", side)] if role.num_running or role.num_waiting else []
        if isinstance(self.lives[1].item.role, Arbitrary):
            possible += [("admit", index) for index in range(len(self.lives[1].item.role._waiting))]
        possible += [("land", index) for index in range(len(self.frames))]
        return possible

    def faults(self) -> list[Event]:
        crashes = [("crash", side) for side in (0, 1) if self.crashes_left[side]]
        running = [int(name[1:]) for name in self.tokens if name not in self.ended]
        return crashes + ([("cancel", index) for index in running] if self.cancels_left else [])

    def happen(self, event: Event) -> None:
        name, index = event
        getattr(self, f"_{name}")(index)
        for part in self.lives:
            if part.is_in_use:
                part.item.forget_free_blocks()
                part.item.pool.check()

    def _start(self, _: int) -> None:
        name = self.waiting.pop(0)
        self.tokens[name] = 0
        self._perform(self.router.item[0].start(request_of(name), 60.0))

    def _hear(self, side: int) -> None:
        sender, message = self.up[side].popleft()
        if sender != self.known[side]:
            return  # router/control/controller.py: dead_epoch
        updates = message.updates if isinstance(message, Tokens) else [message]
        for update in updates:
            self._perform(self.router.item[0].receive(sender, update))

    def _deliver(self, side: int) -> None:
        receiver, message = self.down[side].popleft()
        life = self.lives[side].item
        if receiver != life.epoch:
            return  # worker/control_link.py: stale_messages
        if isinstance(message, PeerLost):
            life.close_peer(message.epoch)
        else:
            life.role.receive(message)
        self._collect(side)

    def _report(self, side: int) -> None:
        self.lives[side].item.role.heed(self.lives[side].item.reports.popleft())
        self._collect(side)

    def _step(self, side: int) -> None:
        self.lives[side].item.steps.step()
        self._collect(side)

    def _admit(self, index: int) -> None:
        role = self.lives[1].item.role
        assert isinstance(role, Arbitrary)
        role.admit(index)
        self._collect(1)

    def _land(self, index: int) -> None:
        self.lives[1].item.land(*self.frames.pop(index))

    def _crash(self, side: int) -> None:
        self.crashes_left[side] -= 1
        epoch = self.lives[side].item.epoch + 1
        self.lives[side] = Part(Life(epoch, side == 0, *self.sizes), life_key)

    def _notice(self, side: int) -> None:
        """The router loses the old life and meets the new one; see router/control/membership.py and controller.py."""
        lost, self.known[side] = self.known[side], self.lives[side].item.epoch
        other = 1 - side
        self.down[other].append((self.known[other], PeerLost(lost)))
        actions = self.router.item[0].lose(lost)
        self._pair_up()
        self._perform([*actions, *self.router.item[0].resume()])

    def _cancel(self, index: int) -> None:
        self.cancels_left -= 1
        self._perform(self.router.item[0].cancel(f"r{index}", GONE))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _pair_up(self) -> None:
        limits, size = self.sizes[0], self.sizes[0].block_size
        groups = [
            ReadyGroup(0, epoch, endpoint_of(epoch, size), num_blocks * size + 1)
            for epoch, num_blocks in zip(self.known, limits.num_blocks, strict=True)
        ]
        self.router.item[1].pair_up(groups[:1], groups[1:])

    def _collect(self, side: int) -> None:
        life = self.lives[side].item
        self.up[side].extend((life.epoch, message) for message in life.sent)
        self.frames.extend(life.frames)
        life.sent.clear()
        life.frames.clear()

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send(receiver, message):
                    self.down[receiver // 10 - 1].append((receiver, message))
                case Deliver(update):
                    self._take(update)
                case End(attempt, outcome):
                    if attempt.request_id in self.ended:
                        raise Violation(f"{attempt.request_id} ended twice")
                    if outcome.code == "internal_error":
                        raise Violation(f"{attempt.request_id}: {outcome.message}")
                    self.ended[attempt.request_id] = outcome.code

    def _take(self, update: TokenUpdate) -> None:
        name = update.attempt.request_id
        if update.token_id != expected_tokens(request_of(name))[self.tokens[name]]:
            raise Violation(f"{name} got token {update.token_id}: computed from KV that is not its own")
        self.tokens[name] += 1

    # --- what must hold when nothing can happen any more --------------------------------------------------------------

    def check_end(self) -> None:
        if len(self.ended) < len(self.tokens) or self.waiting:
            raise Violation(f"deadlock: of {sorted(self.tokens)} only {sorted(self.ended)} ended")
        attempts, dispatcher = self.router.item
        load = dispatcher.load
        if len(attempts) or any(load.prompt_tokens.values()) or any(load.reserved_tokens.values()):
            raise Violation("the router still counts something")
        for life in (part.item for part in self.lives):
            transfers = life.expected or life.sending or life.parked
            if life.pool.counts.held or life.role.num_running or life.role.num_waiting or transfers:
                raise Violation("a block is held for nobody")

    def key(self) -> tuple:
        """Return what tells this state from others."""
        parts = (*(part.key for part in self.lives), self.router.key)
        under_way = tuple(tuple(map(_message_key, channel)) for channel in (*self.down, *self.up))
        frames = frozenset(self.frames)
        counts = (tuple(self.crashes_left), self.cancels_left, tuple(self.known), tuple(self.waiting))
        return parts, under_way, frames, counts, tuple(self.tokens.items()), tuple(sorted(self.ended.items()))


def _message_key(item: tuple[Epoch, AnyMessage]) -> tuple:
    epoch, message = item
    return epoch, type(message), message.attempt if isinstance(message, Prefill | Reserve) else message


def _router_key(router: tuple[Attempts, Dispatcher]) -> tuple:
    attempts = router[0]
    return tuple(map(_course_key, attempts._courses.values())), tuple(attempts._waiting)


def _course_key(course: Course) -> tuple:
    return course.attempt, course.request.generated_token_ids, course.life and _lifecycle_key(course.life)


def _lifecycle_key(life: Lifecycle) -> tuple:
    holders = tuple(sorted(side.value for side in life.holders))
    return life.stage, holders, life.num_drawn, life._is_granted, life._is_handed_off
