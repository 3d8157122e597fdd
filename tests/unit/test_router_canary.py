"""Which pairs get a canary and when, and what /ready makes of it."""

from router.control.canary import LATELY, Canaries, is_canary
from router.control.dispatch import Dispatcher
from router.control.policies import POLICIES, Pair
from tests.unit.test_router_dispatch import group

PERIOD_S = 10.0


def pairs_of(prefill: list[int], decode: list[int]) -> list[Pair]:
    dispatcher = Dispatcher(POLICIES["least_loaded"])
    dispatcher.pair_up([group(epoch) for epoch in prefill], [group(epoch) for epoch in decode])
    return dispatcher.cover()


def test_every_group_stands_in_a_pair_and_there_are_no_more_pairs_than_that_takes() -> None:
    assert [pair.key for pair in pairs_of([1, 2, 3], [11])] == [(1, 11), (2, 11), (3, 11)]
    assert [pair.key for pair in pairs_of([1], [11, 12])] == [(1, 11), (1, 12)]
    assert pairs_of([1], []) == []


def test_a_pair_gets_one_at_once_and_again_only_when_it_was_idle() -> None:
    canaries, pairs = Canaries(PERIOD_S, vocab_size=100), pairs_of([1], [11, 12])
    assert canaries.due(pairs, {}, 5.0) == pairs
    assert canaries.due(pairs, {}, 5.1) == [], "they are on their way"
    assert canaries.due(pairs, {(1, 11): 9.0}, 5.0 + PERIOD_S) == pairs[1:], "the first serves clients"
    assert canaries.due(pairs_of([1], [11, 13]), {(1, 11): 9.0}, 16.0) == pairs_of([1], [11, 13])[1:], "a new life"


def test_ready_names_the_pair_that_nothing_got_through_lately() -> None:
    canaries, pairs = Canaries(PERIOD_S, vocab_size=100), pairs_of([1], [11, 12])
    assert canaries.why_unproved(pairs, {(1, 11): 0.0}, 1.0) == (
        "nothing has got through prefill group 1 and decode group 12 yet"
    )
    proved = {(1, 11): 0.0, (1, 12): 30.0}
    assert canaries.why_unproved(pairs, proved, LATELY * PERIOD_S) is None
    assert "decode group 11 for 41 s" in str(canaries.why_unproved(pairs, proved, LATELY * PERIOD_S + 1))


def test_a_canary_hands_over_a_block_and_takes_a_token_of_each_side() -> None:
    request = Canaries(PERIOD_S, vocab_size=3).request()
    assert is_canary(request.request_id)
    assert (len(request.prompt_token_ids), request.sampling.max_tokens) == (17, 2)
    assert set(request.prompt_token_ids) <= {0, 1, 2}


def test_without_a_period_there_are_none_and_nothing_is_missed() -> None:
    canaries, pairs = Canaries(0, vocab_size=3), pairs_of([1], [11])
    assert canaries.due(pairs, {}, 100.0) == []
    assert canaries.why_unproved(pairs, {}, 100.0) is None
