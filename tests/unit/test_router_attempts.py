"""The router's request lifecycle against honest workers, and against workers that say anything at all."""

import random
import zlib
from collections import Counter, defaultdict, deque
from typing import Any

import msgspec
import pytest

from protocol.identity import Attempt, new_attempt
from protocol.layout import Endpoint, KVLayout, keys_and_values
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
from router.control import avoidance
from router.control.attempts import Attempts
from router.control.course import MAX_CRASHES, MAX_FAILURES, PROGRESS_TOKENS
from router.control.dispatch import Dispatcher
from router.control.events import Action, Cancel, Deliver, Drop, End, EpochLost, FromWorker, Outcome, Send
from router.control.held_prefixes import PIECE_TOKENS, HeldPrefixes
from router.control.lifecycle import Lifecycle, Side
from router.control.policies import POLICIES, ReadyGroup
from router.control.quarantine import QUARANTINE_S, Quarantined

VOCAB_SIZE = 100
GONE = Outcome(Stage.CANCELLED, "client_gone")


def endpoint(epoch: int) -> Endpoint:
    return Endpoint(epoch, KVLayout("m", 1, keys_and_values(1, 8, "float32"), 16, 1), "zmq", ("tcp://a:1",))


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
                self.decoding[attempt] = self.first_index(attempt) + 1
            case Committed(attempt):
                self.prefilling.pop(attempt, None)
            case Abort(attempt):
                self.prefilling.pop(attempt, None)
                self.reserved.pop(attempt, None)
                self.decoding.pop(attempt, None)

    def hand_off(self, attempt: Attempt) -> None:
        if attempt in self.granted and attempt in self.is_prefilled:
            first_token_id = token_at(attempt.request_id, self.first_index(attempt))
            self.outbox.append(Handoff(attempt, first_token_id, Manifest(0, 7, 1, 1)))

    def first_index(self, attempt: Attempt) -> int:
        asked = self.prefilling.get(attempt) or self.reserved[attempt]
        assert asked.generated_token_ids == tuple(
            token_at(attempt.request_id, index) for index in range(len(asked.generated_token_ids))
        )
        return len(asked.generated_token_ids)

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
        index = self.first_index(attempt)
        is_last = self.prefilling[attempt].sampling.max_tokens == index + 1
        self.emit(attempt, index, is_last)
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
        self.now_s = 0.0
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
        if actions:
            self.perform(self.attempts.resume())

    def submit(self) -> None:
        name = f"r{len(self.asked)}"
        own_prompt = (len(self.asked), *range(6))
        asked = request(name, max_tokens=self.rng.randint(1, 6))
        self.asked[name] = msgspec.structs.replace(asked, prompt_token_ids=own_prompt)
        self.perform(self.attempts.start(self.asked[name], deadline_s=self.rng.uniform(50, 5000)))

    def crash(self) -> None:
        index = self.rng.randrange(len(self.roles))
        role, epoch = self.roles[index]
        del self.workers[epoch]
        actions = self.attempts.lose(epoch)
        self.roles[index] = (role, self.spawn())
        self.pair_up()
        self.perform([*actions, *self.attempts.resume()])

    def turn(self, now_s: float) -> None:
        self.now_s = now_s
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
            self.now_s += 0.1
            self.perform([*self.attempts.expire(self.now_s), *self.attempts.resume()])
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
    assert {"length", "client_gone", "deadline_exceeded"} <= set(outcomes)
    assert set(outcomes) <= {"length", "client_gone", "deadline_exceeded", "quarantined"}
    assert outcomes["quarantined"] * 50 < outcomes["length"]


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


class Cluster:
    """Attempts over one prefill and several decode groups, whose lives are lost at will."""

    def __init__(self, *decode: int, num_tokens: int = 1000) -> None:
        self.dispatcher = Dispatcher(POLICIES["least_loaded"])
        self.attempts = Attempts(self.dispatcher, VOCAB_SIZE)
        self.num_tokens = num_tokens
        self.now_s = 0.0
        self.prefill = P
        self.decode = list(decode)
        self.pair_up()

    def pair_up(self) -> None:
        decode = [msgspec.structs.replace(group(e, e), num_tokens=self.num_tokens) for e in self.decode]
        self.dispatcher.pair_up([group(0, self.prefill)], decode)

    def start(self, name: str = "r", **parts: Any) -> Attempt:
        return attempt_in(self.attempts.start(msgspec.structs.replace(request(name, 100), **parts), 100.0))

    def stream(self, attempt: Attempt, *token_ids: int, first: int = 0) -> list[Action]:
        """Let a whole attempt go well, up to its last token here."""
        said: list[tuple[int, Any]] = [
            (attempt.prefill_epoch, TokenUpdate(attempt, first, token_ids[0])),
            (attempt.decode_epoch, Grant(attempt, 0)),
            (attempt.prefill_epoch, Handoff(attempt, token_ids[0], Manifest(0, 1, 1, 1))),
            (attempt.decode_epoch, Committed(attempt)),
            *((attempt.decode_epoch, TokenUpdate(attempt, first + i, t)) for i, t in enumerate(token_ids) if i),
        ]
        return [action for sender, message in said for action in self.attempts.receive(sender, message)]

    def lose(self, epoch: int) -> list[Action]:
        """A decode group is gone, or the prefill group, whose next life has come by then."""
        if epoch == self.prefill:
            self.prefill += 1000
        else:
            self.decode.remove(epoch)
        actions = self.attempts.lose(epoch)
        self.pair_up()
        return [*actions, *self.attempts.resume()]


def attempt_in(actions: list[Action]) -> Attempt:
    return sent(actions, Prefill)[0].attempt


def sent(actions: list[Action], kind: type) -> list[Any]:
    return [send.message for send in actions if isinstance(send, Send) and isinstance(send.message, kind)]


def test_a_stream_that_lost_its_worker_goes_on_behind_its_last_token_and_hears_nothing_of_the_old_one() -> None:
    cluster = Cluster(D, 33)
    first = cluster.start()
    cluster.stream(first, 5, 6, 7)
    actions = cluster.lose(first.decode_epoch)
    assert not [action for action in actions if isinstance(action, End | Deliver)]
    second = attempt_in(actions)
    assert (second.request_id, second.number, second.decode_epoch != first.decode_epoch) == ("r", 1, True)
    for message in (*sent(actions, Prefill), *sent(actions, Reserve)):
        assert message.request.generated_token_ids == (5, 6, 7)
        assert message.request.max_num_tokens == 107
    late = TokenUpdate(first, 3, 99)
    assert cluster.attempts.receive(first.decode_epoch, late) == [Drop("ended_attempt")]
    delivered = [action.update for action in cluster.stream(second, 8, 9, first=3) if isinstance(action, Deliver)]
    assert [(update.index, update.token_id) for update in delivered] == [(3, 8), (4, 9)]
    assert cluster.attempts.continued == {"worker_lost": 1}


def test_without_a_pair_a_stream_waits_for_one_until_its_deadline_and_can_be_cancelled_meanwhile() -> None:
    cluster = Cluster(D)
    cluster.stream(cluster.start("a"), 5, 6)
    cluster.stream(cluster.start("b"), 5, 6)
    cluster.stream(cluster.start("c"), 5, 6)
    assert sent(cluster.lose(D), Prefill) == []
    assert cluster.attempts.stages() == [Stage.QUEUED] * 3
    assert [end.outcome for end in cluster.attempts.cancel("a", GONE)] == [GONE]
    cluster.decode.append(44)
    cluster.attempts.expire(99.0)
    cluster.pair_up()
    assert [message.attempt.decode_epoch for message in sent(cluster.attempts.resume(), Prefill)] == [44, 44]
    cluster.lose(44)
    assert [end.outcome.code for end in cluster.attempts.expire(100.0)] == ["deadline_exceeded"] * 2
    assert len(cluster.attempts) == 0


def test_what_a_leaving_group_holds_goes_on_elsewhere_however_often_and_it_is_told_to_let_go() -> None:
    cluster = Cluster(D, 33)
    attempt = cluster.start()
    for _ in range(2 * MAX_CRASHES):
        actions = [*cluster.attempts.leave(attempt.decode_epoch), *cluster.attempts.resume()]
        assert {send.receiver for send in actions if isinstance(send, Send) and isinstance(send.message, Abort)} == {
            P,
            attempt.decode_epoch,
        }
        attempt = attempt_in(actions)
    assert cluster.attempts.leave(77) == []


def test_a_leaving_prefill_group_does_not_disturb_what_decode_has_taken_over() -> None:
    cluster = Cluster(D)
    cluster.stream(cluster.start(), 5, 6)
    assert cluster.attempts.leave(P) == []


def test_a_request_that_ends_worker_after_worker_is_quarantined_and_so_is_its_prompt_for_ten_minutes() -> None:
    cluster = Cluster(*range(40, 50))
    poison = cluster.start("poison")
    poison = attempt_in(cluster.lose(poison.prefill_epoch))
    for index in range(1, MAX_CRASHES):
        cluster.stream(poison, 5, first=index - 1)
        poison = attempt_in(cluster.lose(poison.decode_epoch))
    (end,) = [action for action in cluster.lose(poison.prefill_epoch) if isinstance(action, End)]
    assert (end.outcome.code, end.outcome.stage) == ("quarantined", Stage.FAILED)
    with pytest.raises(Quarantined, match="600 s"):
        cluster.start("again")
    cluster.start("another", prompt_token_ids=(1, 2, 3))
    cluster.attempts.expire(QUARANTINE_S)
    cluster.start("much later")
    assert cluster.attempts.num_quarantined == 0


def test_a_stream_that_gets_on_between_crashes_is_never_quarantined() -> None:
    cluster = Cluster(*range(40, 60))
    attempt, first = cluster.start(sampling=SamplingParams(max_tokens=500, seed=1)), 0
    for _ in range(4 * MAX_CRASHES):
        cluster.stream(attempt, *range(PROGRESS_TOKENS), first=first)
        attempt, first = attempt_in(cluster.lose(attempt.decode_epoch)), first + PROGRESS_TOKENS


def test_suspects_are_tried_one_at_a_time_so_that_a_poison_request_takes_no_other_with_it() -> None:
    cluster = Cluster(D)
    running = [cluster.start(name, prompt_token_ids=(index, 1)) for index, name in enumerate(["a", "poison", "c"])]
    ended, num_crashes, num_drawn = [], 0, Counter[str]()
    while running:
        if any(attempt.request_id == "poison" for attempt in running):
            actions, num_crashes = cluster.lose(cluster.prefill), num_crashes + 1
            running = []
        else:
            attempt = running.pop(0)
            drawn = cluster.stream(attempt, *range(PROGRESS_TOKENS), first=num_drawn[attempt.request_id])
            num_drawn[attempt.request_id] += PROGRESS_TOKENS
            actions = [*drawn, *cluster.attempts.resume()]
        ended += [(action.attempt.request_id, action.outcome.code) for action in actions if isinstance(action, End)]
        running += [message.attempt for message in sent(actions, Prefill)]
    assert ended == [("poison", "quarantined")]
    assert num_crashes == MAX_CRASHES + 1


def test_who_only_waited_for_a_worker_that_was_lost_is_no_suspect_but_is_not_tried_for_ever() -> None:
    cluster = Cluster(*range(40, 60))
    attempt = cluster.start()
    for index in range(MAX_FAILURES):
        cluster.attempts.receive(P, TokenUpdate(attempt, index, 1))
        attempt, _ = next_attempt(cluster, cluster.lose(attempt.decode_epoch))
    (end,) = [action for action in cluster.lose(attempt.decode_epoch) if isinstance(action, End)]
    assert end.outcome.code == "worker_lost"
    assert cluster.attempts.num_quarantined == 0


def next_attempt(cluster: Cluster, actions: list[Action]) -> tuple[Attempt, float]:
    """Let time go by until the next attempt begins; return it and how long that took."""
    began_s = now_s = cluster.now_s
    while not sent(actions, Prefill):
        now_s += 0.25
        actions = [*cluster.attempts.expire(now_s), *cluster.attempts.resume()]
    cluster.now_s = now_s
    return attempt_in(actions), now_s - began_s


def fail_transfer(cluster: Cluster, attempt: Attempt) -> list[Action]:
    failed = Failed(attempt, "transfer_failed", "no way")
    return [*cluster.attempts.receive(attempt.decode_epoch, failed), *cluster.attempts.resume()]


def test_a_pair_whose_transfer_failed_is_left_alone_for_a_while_and_then_tried_again() -> None:
    cluster = Cluster(D, 33)
    attempt = cluster.start()
    other = attempt_in(fail_transfer(cluster, attempt))
    assert other.decode_epoch != attempt.decode_epoch
    assert {cluster.start(f"r{i}").decode_epoch for i in range(6)} == {other.decode_epoch}
    cluster.attempts.expire(avoidance.FIRST_S)
    assert cluster.start("later").decode_epoch == attempt.decode_epoch


def test_transfers_that_keep_failing_end_with_their_reason_after_pauses_that_grow() -> None:
    cluster = Cluster(D)
    attempt, pauses = cluster.start(), []
    for _ in range(MAX_FAILURES):
        attempt, pause_s = next_attempt(cluster, fail_transfer(cluster, attempt))
        pauses.append(pause_s)
    assert pauses == [0.0, 0.25, 0.5, 1.0, 2.0]
    (end,) = [action for action in fail_transfer(cluster, attempt) if isinstance(action, End)]
    assert (end.outcome.code, end.outcome.message) == ("transfer_failed", "no way")


def test_an_answer_too_long_for_every_pair_that_is_left_ends_and_says_so() -> None:
    cluster = Cluster(D)
    attempt = cluster.start()
    cluster.decode.append(33)
    cluster.num_tokens = 100
    (end,) = [action for action in cluster.lose(attempt.decode_epoch) if isinstance(action, End)]
    assert end.outcome.code == "worker_lost"
    assert "at most 100 tokens" in end.outcome.message


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
    attempts, begun = Attempts(dispatcher, VOCAB_SIZE, held), []
    dispatcher.pair_up([group(0, P)], [group(0, D)])

    def told(name: str, salt: str = "") -> int:
        asked = Request(name, tuple(range(100)) * 3, SamplingParams(max_tokens=200, seed=1), salt)
        (prefill,) = sent(attempts.start(asked, 1e9), Prefill)
        begun.append(prefill.attempt)
        return prefill.num_held_tokens

    assert told("first") == 0
    attempt = begun[0]
    for event in (Grant(attempt, 0), TokenUpdate(attempt, 0, 1)):
        attempts.receive(P if isinstance(event, TokenUpdate) else D, event)
    attempts.receive(P, Handoff(attempt, 1, Manifest(0, 1, 1, 1)))
    attempts.receive(D, Committed(attempt))
    attempts.receive(D, TokenUpdate(attempt, 1, 2))
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
