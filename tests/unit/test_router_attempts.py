"""The router's request lifecycle against honest workers, and against workers that say anything at all."""

import random
import zlib
from collections import Counter, defaultdict, deque
from typing import Any

import pytest

from protocol.identity import Attempt, new_attempt
from protocol.layout import Endpoint, KVLayout
from protocol.messages import (
    Abort,
    AnyMessage,
    Committed,
    Failed,
    Fetch,
    Grant,
    Handoff,
    Manifest,
    Prefill,
    Reserve,
    TokenLogprobs,
    TokenUpdate,
    Unfetched,
)
from protocol.request import Request, SamplingParams
from protocol.stages import Stage
from router.control.attempts import Attempts
from router.control.dispatch import Dispatcher
from router.control.held_prefixes import PIECE_TOKENS, HeldPrefixes
from router.control.lifecycle import (
    Action,
    Cancel,
    Deliver,
    Drop,
    End,
    EpochLost,
    FromWorker,
    Lifecycle,
    Outcome,
    Send,
    Side,
)
from router.control.policies import POLICIES, ReadyGroup

VOCAB_SIZE = 100
GONE = Outcome(Stage.CANCELLED, "client_gone")


def endpoint(epoch: int) -> Endpoint:
    return Endpoint(epoch, KVLayout("m", 1, 1, 8, "float32", 16, 1), "zmq", ("tcp://a:1",))


def group(number: int, epoch: int) -> ReadyGroup:
    return ReadyGroup(number, epoch, endpoint(epoch), 1000)


def request(name: str, max_tokens: int = 5, num_prompt_tokens: int = 7) -> Request:
    return Request(name, tuple(range(num_prompt_tokens)), SamplingParams(max_tokens=max_tokens, seed=1))


def token_at(request_id: str, index: int) -> int:
    return (zlib.crc32(request_id.encode()) + 31 * index) % VOCAB_SIZE


class HonestWorker:
    """One group: answers in order on its own link, holds what it should, lets go when it should."""

    def __init__(self, epoch: int, rng: random.Random, is_colocated: bool) -> None:
        self.epoch, self.rng, self.is_colocated = epoch, rng, is_colocated
        self.inbox: deque[AnyMessage] = deque()
        self.outbox: deque[AnyMessage | TokenUpdate] = deque()
        self.prefilling: dict[Attempt, Request] = {}
        self.reserved: dict[Attempt, Request] = {}
        self.decoding: dict[Attempt, int] = {}
        self.granted: set[Attempt] = set()
        self.is_prefilled: set[Attempt] = set()

    def holds(self) -> int:
        return len(self.prefilling) + len(self.reserved)

    def receive(self) -> None:
        match self.inbox.popleft():
            case Reserve(attempt, asked):
                self.reserved[attempt] = asked
                self.outbox.append(Grant(attempt, 0))
            case Prefill(attempt, asked):
                self.prefilling[attempt] = asked
            case Grant(attempt) if attempt in self.prefilling:
                self.granted.add(attempt)
                self.hand_off(attempt)
            case Handoff(attempt) if attempt in self.reserved:
                self.outbox.append(Committed(attempt))
                self.decoding[attempt] = 1
            case Committed(attempt):
                self.prefilling.pop(attempt, None)
            case Abort(attempt):
                self.prefilling.pop(attempt, None)
                self.reserved.pop(attempt, None)
                self.decoding.pop(attempt, None)

    def hand_off(self, attempt: Attempt) -> None:
        if attempt in self.granted and attempt in self.is_prefilled:
            self.outbox.append(Handoff(attempt, token_at(attempt.request_id, 0), Manifest(0, 7, 1, 1)))

    def step(self) -> None:
        """Compute one prompt, or one token of everything that decodes; now and then fail at something."""
        fresh = [attempt for attempt in self.prefilling if attempt not in self.is_prefilled]
        if fresh:
            self.prefill(self.rng.choice(fresh))
        for attempt in list(self.decoding):
            self.decode(attempt)
        if self.rng.random() < 0.02 and (self.prefilling or self.reserved):
            self.fail(self.rng.choice([*self.prefilling, *self.reserved]))

    def prefill(self, attempt: Attempt) -> None:
        self.is_prefilled.add(attempt)
        is_last = self.prefilling[attempt].sampling.max_tokens == 1
        self.emit(attempt, 0, is_last)
        if is_last:
            del self.prefilling[attempt]
        else:
            self.hand_off(attempt)

    def decode(self, attempt: Attempt) -> None:
        index = self.decoding[attempt]
        self.decoding[attempt] = index + 1
        is_last = index + 1 == self.reserved[attempt].sampling.max_tokens
        self.emit(attempt, index, is_last)
        if is_last:
            del self.decoding[attempt], self.reserved[attempt]

    def fail(self, attempt: Attempt) -> None:
        if self.is_colocated:
            side = self.prefilling if attempt in self.prefilling else self.reserved
            side.pop(attempt, None)
        else:
            self.prefilling.pop(attempt, None)
            self.reserved.pop(attempt, None)
        self.decoding.pop(attempt, None)
        self.outbox.append(Failed(attempt, "transfer_failed", "a frame was broken"))

    def emit(self, attempt: Attempt, index: int, is_last: bool) -> None:
        reason = "length" if is_last else None
        self.outbox.append(TokenUpdate(attempt, index, token_at(attempt.request_id, index), None, reason))


class World:
    """The real table of attempts between honest workers, clients that come and go, and crashes."""

    def __init__(self, seed: int, is_colocated: bool) -> None:
        self.rng = random.Random(seed)
        self.is_colocated = is_colocated
        self.dispatcher = Dispatcher(POLICIES["least_loaded"])
        self.attempts = Attempts(self.dispatcher, VOCAB_SIZE)
        self.next_epoch = 1
        self.workers: dict[int, HonestWorker] = {}
        self.roles: list[tuple[str, int]] = []
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        self.outcomes: dict[str, Outcome] = {}
        self.asked: dict[str, Request] = {}
        self.drops: Counter[str] = Counter()
        for role in ("both",) * 2 if is_colocated else ("prefill",) * 2 + ("decode",) * 2:
            self.roles.append((role, self.spawn()))
        self.pair_up()

    def spawn(self) -> int:
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        self.workers[epoch] = HonestWorker(epoch, self.rng, self.is_colocated)
        return epoch

    def pair_up(self) -> None:
        ready = {
            role: [group(i, epoch) for i, (r, epoch) in enumerate(self.roles) if r == role] for role, _ in self.roles
        }
        if self.is_colocated:
            self.dispatcher.colocate(ready["both"])
        else:
            self.dispatcher.pair_up(ready["prefill"], ready["decode"])

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(receiver, message):
                    if receiver in self.workers:
                        self.workers[receiver].inbox.append(message)
                case Deliver(update):
                    name = update.attempt.request_id
                    assert name not in self.outcomes, "a token after the end"
                    assert update.index == len(self.tokens[name]), "a gap or a double"
                    self.tokens[name].append(update.token_id)
                case End(attempt, outcome):
                    assert attempt.request_id not in self.outcomes, "ended twice"
                    self.outcomes[attempt.request_id] = outcome
                case Drop(reason):
                    self.drops[reason] += 1

    def submit(self) -> None:
        name = f"r{len(self.asked)}"
        self.asked[name] = request(name, max_tokens=self.rng.randint(1, 6))
        self.perform(self.attempts.start(self.asked[name], deadline_s=self.rng.uniform(50, 5000)))

    def crash(self) -> None:
        index = self.rng.randrange(len(self.roles))
        role, epoch = self.roles[index]
        del self.workers[epoch]
        self.perform(self.attempts.lose(epoch))
        self.roles[index] = (role, self.spawn())
        self.pair_up()

    def turn(self, now_s: float) -> None:
        choice = self.rng.random()
        worker = self.rng.choice(list(self.workers.values()))
        if choice < 0.1:
            self.submit()
        elif choice < 0.4 and worker.inbox:
            worker.receive()
        elif choice < 0.7 and worker.outbox:
            self.perform(self.attempts.receive(worker.epoch, worker.outbox.popleft()))
        elif choice < 0.95:
            worker.step()
        elif choice < 0.97 and self.asked:
            self.perform(self.attempts.cancel(self.rng.choice(list(self.asked)), GONE))
        elif choice < 0.975:
            self.crash()
        elif choice < 0.98:
            self.perform(self.attempts.expire(now_s))

    def settle(self) -> None:
        """Nothing new comes; everything that is under way arrives."""
        for _ in range(200):
            for worker in self.workers.values():
                while worker.inbox:
                    worker.receive()
                worker.step()
                while worker.outbox:
                    self.perform(self.attempts.receive(worker.epoch, worker.outbox.popleft()))


@pytest.mark.parametrize("is_colocated", [False, True])
def test_whatever_happens_every_request_ends_once_and_no_block_stays_held(is_colocated: bool) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(150):
        world = World(seed, is_colocated)
        for turn in range(400):
            world.turn(float(turn))
        world.settle()
        assert set(world.outcomes) == set(world.asked)
        for name, outcome in world.outcomes.items():
            tokens = world.tokens[name]
            assert tokens == [token_at(name, index) for index in range(len(tokens))]
            if outcome.stage is Stage.FINISHED:
                assert len(tokens) == world.asked[name].sampling.max_tokens
            outcomes[outcome.code] += 1
        assert len(world.attempts) == 0
        assert [worker.holds() for worker in world.workers.values()] == [0] * len(world.workers)
        load = world.dispatcher.load
        assert not any(load.prompt_tokens.values())
        assert not any(load.reserved_tokens.values())
        assert set(world.drops) <= {"ended_attempt"}, "an honest worker was taken for a broken one"
    assert {"length", "client_gone", "worker_lost", "transfer_failed", "deadline_exceeded"} <= set(outcomes)


P, D = 11, 22


def started(max_tokens: int = 5) -> tuple[Lifecycle, Attempt, list[Action]]:
    attempt = new_attempt("r", 0, P, D)
    life = Lifecycle(attempt, request("r", max_tokens), VOCAB_SIZE)
    return life, attempt, life.start(endpoint(P), endpoint(D))


def random_event(rng: random.Random, attempt: Attempt) -> FromWorker | EpochLost | Cancel:
    messages = [
        Grant(attempt, 0),
        Fetch(attempt, 0, 5),
        Unfetched(attempt, "why"),
        Handoff(attempt, 1, Manifest(0, 1, 1, 1)),
        Committed(attempt),
        Failed(attempt, rng.choice(["worker_lost", "no_such_code"]), "why"),
        *(TokenUpdate(attempt, i, rng.choice([1, 1, 1, 500, -1]), None, rng.choice([None, "stop"])) for i in range(6)),
    ]
    if rng.random() < 0.9:
        return FromWorker(rng.choice([P, D, 33]), rng.choice(messages))
    return rng.choice([EpochLost(rng.choice([P, D, 33])), Cancel(GONE)])


def test_workers_that_say_anything_in_any_order_cannot_break_the_clients_stream_or_hide_a_holder() -> None:
    stages: Counter[Stage] = Counter()
    for seed in range(4000):
        rng = random.Random(seed)
        life, attempt, actions = started()
        let_go: set[Side] = set()
        for _ in range(rng.randint(1, 25)):
            event = random_event(rng, attempt)
            before = set(life.holders)
            actions += (done := life.step(event))
            told = {send.receiver for send in done if isinstance(send, Send) and isinstance(send.message, Abort)}
            for side, epoch in ((Side.PREFILL, P), (Side.DECODE, D)):
                if side in before - life.holders:
                    relayed = any(isinstance(s, Send) and isinstance(s.message, Committed) for s in done)
                    said_so = isinstance(event, FromWorker) and event.sender == epoch
                    lost = event == EpochLost(epoch)
                    assert epoch in told or said_so or lost or (relayed and side is Side.PREFILL)
                    let_go.add(side)
        actions += life.step(Cancel(GONE))
        assert life.is_over
        ends = [action for action in actions if isinstance(action, End)]
        indices = [action.update.index for action in actions if isinstance(action, Deliver)]
        assert len(ends) == 1
        assert indices == list(range(len(indices)))
        last = actions.index(ends[0])
        assert not any(isinstance(action, Deliver) for action in actions[last:])
        stages[life.stage] += 1
    assert set(stages) == {Stage.FINISHED, Stage.CANCELLED, Stage.FAILED}


def test_a_first_token_that_finishes_frees_the_reservation_on_decode() -> None:
    life, attempt, _ = started(max_tokens=1)
    actions = life.step(FromWorker(P, TokenUpdate(attempt, 0, 3, None, "length")))
    assert Send(D, Abort(attempt)) in actions
    assert actions[-1] == End(attempt, Outcome(Stage.FINISHED, "length"))
    assert life.is_over


def test_a_fetch_goes_to_decode_once_and_word_of_its_failure_comes_back_while_prefill_is_there() -> None:
    life, attempt, _ = started()
    fetch, unfetched = Fetch(attempt, 0, 5), Unfetched(attempt, "a frame was broken")
    life.step(FromWorker(D, Grant(attempt, 5)))
    assert life.step(FromWorker(D, fetch)) == [Drop("wrong_sender")]
    assert life.step(FromWorker(P, fetch)) == [Send(D, fetch)]
    assert life.step(FromWorker(D, unfetched)) == [Send(P, unfetched)]
    life.step(FromWorker(P, TokenUpdate(attempt, 0, 1)))
    life.step(FromWorker(P, Handoff(attempt, 1, Manifest(0, 1, 1, 1))))
    life.step(FromWorker(D, Committed(attempt)))
    assert life.step(FromWorker(D, unfetched)) == []
    assert life.stage is Stage.DECODING


@pytest.mark.parametrize("after", [(), (Grant, Fetch), (Grant, Handoff)], ids=["no grant", "a fetch", "the handoff"])
def test_a_fetch_where_there_can_be_none_ends_the_request(after: tuple[type, ...]) -> None:
    life, attempt, _ = started()
    said = {Grant: Grant(attempt, 5), Fetch: Fetch(attempt, 0, 5), Handoff: Handoff(attempt, 1, Manifest(0, 1, 1, 1))}
    for kind in after:
        life.step(FromWorker(D if kind is Grant else P, said[kind]))
    assert Drop("out_of_order") in life.step(FromWorker(P, said[Fetch]))
    assert life.stage is Stage.FAILED


def test_prefill_is_told_what_decode_seems_to_hold_where_there_is_room_for_the_request() -> None:
    dispatcher, held = Dispatcher(POLICIES["least_loaded"]), HeldPrefixes()
    attempts = Attempts(dispatcher, VOCAB_SIZE, held)
    dispatcher.pair_up([group(0, P)], [group(0, D)])

    def told(name: str, salt: str = "") -> int:
        asked = Request(name, tuple(range(100)) * 3, SamplingParams(max_tokens=200, seed=1), salt)
        (prefill,) = [send.message for send in attempts.start(asked, 1e9) if isinstance(send.message, Prefill)]
        return prefill.num_held_tokens

    assert told("first") == 0
    (life,) = attempts._lives.values()
    for event in (Grant(life.attempt, 0), TokenUpdate(life.attempt, 0, 1)):
        attempts.receive(P if isinstance(event, TokenUpdate) else D, event)
    attempts.receive(P, Handoff(life.attempt, 1, Manifest(0, 1, 1, 1)))
    attempts.receive(D, Committed(life.attempt))
    attempts.receive(D, TokenUpdate(life.attempt, 1, 2))
    attempts.cancel("first", GONE)
    assert told("second") == 300 // PIECE_TOKENS * PIECE_TOKENS
    assert told("third", salt="another") == 0
    assert told("no room left beside the others") == 0
    attempts.cancel_all(GONE)
    attempts.lose(D)
    dispatcher.pair_up([group(0, P)], [group(0, D)])
    assert told("after its loss") == 0


def test_losing_prefill_after_the_commit_does_not_disturb_the_stream() -> None:
    life, attempt, _ = started()
    for sender, message in (
        (P, TokenUpdate(attempt, 0, 1)),
        (D, Grant(attempt, 0)),
        (P, Handoff(attempt, 1, Manifest(0, 1, 1, 1))),
        (D, Committed(attempt)),
    ):
        life.step(FromWorker(sender, message))
    assert life.step(EpochLost(P)) == []
    assert life.step(FromWorker(D, TokenUpdate(attempt, 1, 9))) == [Deliver(TokenUpdate(attempt, 1, 9))]


@pytest.mark.parametrize("is_lost", [False, True])
def test_prefill_is_remembered_until_it_may_let_go_even_when_the_client_has_everything(is_lost: bool) -> None:
    life, attempt, _ = started(max_tokens=2)
    life.step(FromWorker(P, TokenUpdate(attempt, 0, 1)))
    life.step(FromWorker(D, Grant(attempt, 0)))
    life.step(FromWorker(P, Handoff(attempt, 1, Manifest(0, 1, 1, 1))))
    end = life.step(FromWorker(D, TokenUpdate(attempt, 1, 9, None, "length")))[-1]
    assert end == End(attempt, Outcome(Stage.FINISHED, "length"))
    assert not life.is_over
    if is_lost:
        assert life.step(EpochLost(P)) == []
    else:
        assert life.step(FromWorker(D, Committed(attempt))) == [Send(P, Committed(attempt))]
    assert life.is_over


def test_a_token_of_another_sender_or_of_an_earlier_attempt_is_never_delivered() -> None:
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    dispatcher.pair_up([group(0, P)], [group(0, D)])
    attempts = Attempts(dispatcher, VOCAB_SIZE)
    actions = attempts.start(request("r"), 100.0)
    attempt = next(send.message.attempt for send in actions if isinstance(send, Send))
    stale = new_attempt("r", 0, P, D)
    assert attempts.receive(P, TokenUpdate(stale, 0, 1)) == [Drop("ended_attempt")]
    assert attempts.receive(D, TokenUpdate(attempt, 0, 1)) == [Drop("wrong_sender")]
    assert attempts.receive(P, TokenUpdate(attempt, 0, 1)) == [Deliver(TokenUpdate(attempt, 0, 1))]


def test_a_gap_in_the_tokens_ends_the_request_with_an_error_and_frees_both_sides() -> None:
    life, attempt, _ = started()
    life.step(FromWorker(D, Grant(attempt, 0)))
    life.step(FromWorker(P, TokenUpdate(attempt, 0, 1)))
    life.step(FromWorker(P, Handoff(attempt, 1, Manifest(0, 1, 1, 1))))
    actions = life.step(FromWorker(D, TokenUpdate(attempt, 2, 1)))
    assert {Send(P, Abort(attempt)), Send(D, Abort(attempt))} <= set(actions)
    assert isinstance(actions[-1], End)
    assert actions[-1].outcome.code == "internal_error"


@pytest.mark.parametrize(
    "update",
    [
        {"num_cached_tokens": -1},
        {"num_cached_tokens": 8},  # of a prompt of seven
        {"logprobs": TokenLogprobs(-0.5, (1, 1 << 62), (-0.5, -0.6))},
        {"logprobs": TokenLogprobs(-0.5, (-1,), (-0.5,))},
    ],
)
def test_a_token_with_something_beside_it_that_cannot_be_ends_the_request(update: dict[str, Any]) -> None:
    """Counters that cannot count it and tokenizers that do not know it would raise where the client is answered."""
    life, attempt, _ = started()
    dropped, *_, end = life.step(FromWorker(P, TokenUpdate(attempt, 0, 1, **update)))
    assert dropped == Drop("out_of_order")
    assert isinstance(end, End)
    assert end.outcome.code == "internal_error"


def test_only_a_first_token_was_cached() -> None:
    life, attempt, _ = started()
    life.step(FromWorker(D, Grant(attempt, 0)))
    life.step(FromWorker(P, TokenUpdate(attempt, 0, 1, num_cached_tokens=7)))
    life.step(FromWorker(P, Handoff(attempt, 1, Manifest(0, 1, 1, 1))))
    assert life.step(FromWorker(D, TokenUpdate(attempt, 1, 1, num_cached_tokens=7)))[0] == Drop("out_of_order")


def test_a_handoff_with_a_token_that_is_none_never_reaches_decode() -> None:
    life, attempt, _ = started()
    life.step(FromWorker(D, Grant(attempt, 0)))
    actions = life.step(FromWorker(P, Handoff(attempt, 1 << 40, Manifest(0, 1, 1, 1))))
    assert actions[0] == Drop("out_of_order")
    assert {Send(P, Abort(attempt)), Send(D, Abort(attempt))} <= set(actions)
