"""Which pair gets the next request: balance, room, and groups that do not fit together."""

import itertools
import random

import msgspec
import pytest

from protocol.identity import new_attempt
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.request import Request, SamplingParams
from router.control.dispatch import Dispatcher, NoPair, PromptTooLong, incompatibility
from router.control.policies import POLICIES, Pair, ReadyGroup

LAYOUT = KVLayout("m", 2, keys_and_values(4, 8, "float32"), 16, 1)
WIDE = keys_and_values(4, 32, "float32")


def group(epoch: int, num_tokens: int = 1000, transport: str = "zmq", **layout: object) -> ReadyGroup:
    changed = msgspec.structs.replace(LAYOUT, **layout)
    return ReadyGroup(epoch, epoch, Endpoint(epoch, changed, transport, ("tcp://a:1",)), num_tokens)


def request(num_prompt_tokens: int = 10, max_tokens: int = 10) -> Request:
    return Request("r", (1,) * num_prompt_tokens, SamplingParams(max_tokens=max_tokens, seed=0))


def dispatch(dispatcher: Dispatcher, asked: Request, number: int) -> Pair:
    pair = dispatcher.choose(asked)
    dispatcher.started(new_attempt(f"r{number}", 0, pair.prefill.epoch, pair.decode.epoch), asked)
    return pair


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_equal_requests_are_spread_evenly_over_both_sides(policy) -> None:
    dispatcher = Dispatcher(policy)
    dispatcher.pair_up([group(1), group(2), group(3)], [group(11), group(12)])
    pairs = [dispatch(dispatcher, request(), number) for number in range(60)]
    assert {epoch: sum(p.prefill.epoch == epoch for p in pairs) for epoch in (1, 2, 3)} == {1: 20, 2: 20, 3: 20}
    assert {epoch: sum(p.decode.epoch == epoch for p in pairs) for epoch in (11, 12)} == {11: 30, 12: 30}


def test_least_loaded_sends_short_prompts_past_a_long_one() -> None:
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    dispatcher.pair_up([group(1), group(2)], [group(11)])
    busy = dispatch(dispatcher, request(num_prompt_tokens=500), 0).prefill.epoch
    others = {dispatch(dispatcher, request(num_prompt_tokens=10), number).prefill.epoch for number in range(1, 20)}
    assert others == {1, 2} - {busy}


def test_what_has_ended_no_longer_counts() -> None:
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    dispatcher.pair_up([group(1)], [group(11)])
    attempt = new_attempt("r", 0, 1, 11)
    dispatcher.started(attempt, request())
    assert (dispatcher.load.prompt_tokens[1], dispatcher.load.reserved_tokens[11]) == (10, 20)
    dispatcher.prefilled(attempt)
    assert (dispatcher.load.prompt_tokens[1], dispatcher.load.reserved_tokens[11]) == (0, 20)
    dispatcher.ended(attempt)
    dispatcher.ended(attempt)
    assert (dispatcher.load.prompt_tokens[1], dispatcher.load.reserved_tokens[11]) == (0, 0)


def test_groups_that_do_not_fit_are_never_paired_and_the_reason_names_both_values() -> None:
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    dispatcher.pair_up([group(1)], [group(11, planes=WIDE), group(12)])
    assert {dispatch(dispatcher, request(), number).decode.epoch for number in range(10)} == {12}
    dispatcher.pair_up([group(1)], [group(11, planes=WIDE)])
    with pytest.raises(
        NoPair, match=r"KV geometry differs: 4 x 8 float32 \+ 4 x 8 float32 and 4 x 32 float32 \+ 4 x 32 float32"
    ):
        dispatcher.choose(request())
    dispatcher.pair_up([group(1)], [group(11, transport="gloo")])
    assert "transport differs: zmq and gloo" in str(dispatcher.why_none)


def test_why_there_is_no_pair_names_the_role_that_is_missing() -> None:
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    assert dispatcher.why_none == "no worker is ready yet"
    dispatcher.pair_up([group(1)], [])
    assert dispatcher.why_none == "no decode worker is ready"
    dispatcher.pair_up([], [])
    assert dispatcher.why_none == "no prefill and no decode worker is ready"
    dispatcher.pair_up([group(1)], [group(11)])
    assert dispatcher.why_none is None


def test_a_request_goes_only_where_it_fits_and_the_error_says_what_would() -> None:
    dispatcher = Dispatcher(POLICIES["round_robin"])
    dispatcher.pair_up([group(1, num_tokens=100)], [group(11, num_tokens=50), group(12, num_tokens=200)])
    large = request(num_prompt_tokens=90, max_tokens=60)
    assert {dispatch(dispatcher, large, number).decode.epoch for number in range(5)} == {12}
    assert dispatcher.capacity(90) == 200
    with pytest.raises(PromptTooLong, match="at most 100 tokens"):
        dispatcher.capacity(101)
    with pytest.raises(PromptTooLong, match="at most 200 tokens"):
        dispatcher.choose(request(num_prompt_tokens=90, max_tokens=200))


def random_groups(rng: random.Random, first_epoch: int) -> list[ReadyGroup]:
    return [
        group(
            first_epoch + index,
            num_tokens=rng.choice([30, 60, 1000]),
            transport=rng.choice(["zmq", "zmq", "gloo"]),
            planes=rng.choice([LAYOUT.planes, LAYOUT.planes, WIDE]),
            tensor_parallel=rng.choice([1, 2]),
        )
        for index in range(rng.randint(1, 6))
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_the_choice_is_the_least_of_all_pairs(name: str) -> None:
    """Held against a look at every pair: costs count first, prefill's before decode's, then turns in that order."""
    rng, policy = random.Random(4), POLICIES[name]
    for _ in range(200):
        prefill, decode = random_groups(rng, 1), random_groups(rng, 101)
        dispatcher, under_way = Dispatcher(policy), []
        dispatcher.pair_up(prefill, decode)
        for number in range(30):
            asked, load = request(rng.randint(1, 70), rng.randint(1, 40)), dispatcher.load
            order_of = {
                (p.epoch, d.epoch): (
                    *(policy.prefill(p, load), policy.decode(d, load)),
                    *(load.last_used[p.epoch], load.last_used[d.epoch]),
                )
                for p, d in itertools.product(prefill, decode)
                if incompatibility(p, d) is None
                and len(asked.prompt_token_ids) <= p.num_tokens
                and asked.max_num_tokens <= d.num_tokens
            }
            if not order_of:
                with pytest.raises((NoPair, PromptTooLong)):
                    dispatcher.choose(asked)
                continue
            pair = dispatcher.choose(asked)
            assert order_of[pair.prefill.epoch, pair.decode.epoch] == min(order_of.values())
            under_way.append(new_attempt(f"r{number}", 0, pair.prefill.epoch, pair.decode.epoch))
            dispatcher.started(under_way[-1], asked)
            if rng.random() < 0.4:
                dispatcher.ended(under_way.pop(rng.randrange(len(under_way))))


def test_colocated_groups_pair_with_themselves_only() -> None:
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    dispatcher.colocate([group(1), group(2)])
    pairs = [dispatch(dispatcher, request(), number) for number in range(10)]
    assert all(pair.prefill is pair.decode for pair in pairs)
    assert len({pair.prefill.epoch for pair in pairs}) == 2


@pytest.mark.parametrize("name", POLICIES)
def test_the_choice_of_a_colocated_group_is_the_least_of_all_with_room(name: str) -> None:
    rng, policy = random.Random(5), POLICIES[name]
    for _ in range(20):
        groups = [group(epoch, num_tokens=rng.choice([30, 60, 1000])) for epoch in range(1, rng.randint(3, 8))]
        dispatcher, under_way = Dispatcher(policy), []
        dispatcher.colocate(groups)
        for number in range(200):
            asked, load = request(rng.randint(1, 20), rng.randint(1, 40)), dispatcher.load
            roomy = [g for g in groups if asked.max_num_tokens <= g.num_tokens]
            if roomy:
                costs = [(policy.prefill(g, load), policy.decode(g, load), load.last_used[g.epoch]) for g in roomy]
                pair = dispatcher.choose(asked)
                assert pair.prefill is pair.decode is roomy[costs.index(min(costs))]
                under_way.append(new_attempt(f"r{number}", 0, pair.prefill.epoch, pair.decode.epoch))
                dispatcher.started(under_way[-1], asked)
            if under_way and rng.random() < 0.5:
                rng.choice([dispatcher.prefilled, dispatcher.ended])(under_way.pop(rng.randrange(len(under_way))))
