"""What the sampler promises: the right distribution, and a token that depends on nothing but its request."""

import math
import random
from collections.abc import Sequence

import pytest
import torch

from engine.sampler import Drawn, Sampler, SamplingRow
from engine.token_counts import TokenCounts
from protocol.request import SamplingParams
from tests.sampling import WrittenText, row_of, sample

VOCAB = 67


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def row(output: Sequence[int] = (), prompt: Sequence[int] = (1, 2), **params: object) -> SamplingRow:
    return row_of(SamplingParams(**{"max_tokens": 9, "seed": 0, **params}), prompt, output)  # type: ignore[arg-type]


def random_row(rng: random.Random) -> SamplingRow:
    """Any mixture of parameters that a request may have."""
    params = SamplingParams(
        max_tokens=100,
        seed=rng.getrandbits(64),
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 5, 1000]),
        top_p=rng.choice([1.0, 0.9, 0.2]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        presence_penalty=rng.choice([0.0, 0.0, 1.0]),
        frequency_penalty=rng.choice([0.0, 0.0, -0.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logit_bias=rng.choice([{}, {3: 2.0, 60: -100.0}]),
        stop_token_ids=(4, 5),
        min_tokens=rng.choice([0, 3]),
        num_logprobs=rng.choice([None, 0, 3]),
    )
    prompt, output = ([rng.randrange(VOCAB) for _ in range(rng.randrange(9))] for _ in range(2))
    return row_of(params, prompt, output)


@pytest.mark.parametrize(("vocab_size", "num_batches"), [(VOCAB, 30), (5003, 10)])
def test_a_row_gives_the_same_alone_and_in_any_batch(vocab_size: int, num_batches: int) -> None:
    rng = random.Random(vocab_size)
    for _ in range(num_batches):
        rows = [random_row(rng) for _ in range(rng.randrange(1, 24))]
        logits = torch.randn(len(rows), vocab_size) * 3
        together = sample(logits, rows)
        order = rng.sample(range(len(rows)), len(rows))
        shuffled = sample(logits[order], [rows[index] for index in order])
        for place, index in enumerate(order):
            assert shuffled[place] == together[index] == sample(logits[index : index + 1], [rows[index]])[0]


def test_draws_follow_the_distribution() -> None:
    """Pearson's statistic over 20 tokens stays far below a bound that a wrong distribution exceeds at once."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1))
    temperature = 0.7
    over_seeds = [row(seed=seed, temperature=temperature) for seed in range(5000)]
    over_positions = [row(seed=5, output=range(position), temperature=temperature) for position in range(5000)]
    for rows in (over_seeds, over_positions):
        expected = (logits.double() / temperature).softmax(dim=0) * len(rows)
        counts = count(sample(logits.expand(len(rows), -1), rows), 20)
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 60  # 19 degrees of freedom: chance alone exceeds it once in 200,000 times


def count(drawn: list[Drawn], vocab_size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor([one.token_id for one in drawn]), minlength=vocab_size).double()


def test_all_64_bits_of_the_seed_count() -> None:
    logits = torch.zeros(1, 1000)
    seeds = [0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]
    drawn = [sample(logits, [row(seed=seed)])[0].token_id for seed in seeds]
    assert len(set(drawn)) == len(seeds)
    assert drawn == [sample(logits, [row(seed=seed)])[0].token_id for seed in seeds]


def test_temperature_zero_takes_the_best_token() -> None:
    logits = torch.randn(5, VOCAB)
    assert [one.token_id for one in sample(logits, [row(temperature=0.0)] * 5)] == logits.argmax(dim=1).tolist()


def test_a_row_that_is_not_finite_is_marked_and_spoils_no_other() -> None:
    logits = torch.randn(5, VOCAB)
    rows = [row(seed=n, num_logprobs=2, top_p=0.9) for n in range(5)]
    clean = sample(logits, rows)
    for bad in (math.nan, math.inf, -math.inf):
        broken = logits.clone()
        broken[1, 7] = bad
        drawn = sample(broken, rows)
        assert not drawn[1].is_valid
        assert drawn[1].logprobs is None
        assert [drawn[i] for i in (0, 2, 3, 4)] == [clean[i] for i in (0, 2, 3, 4)]
        assert all(one.is_valid for one in clean)


def greedy(logits: list[float], **options: object) -> int:
    return sample(torch.tensor([logits]), [row(temperature=0.0, **options)])[0].token_id


def test_presence_and_frequency_look_at_the_output_only() -> None:
    assert greedy([3.0, 2.5, 0.0], prompt=(0, 0), presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert greedy([3.0, 2.5, 0.0], output=(0,), presence_penalty=1.0) == 1
    assert greedy([3.0, 2.5, 0.0], output=(0,), frequency_penalty=0.4) == 0
    assert greedy([3.0, 2.5, 0.0], output=(0, 0), frequency_penalty=0.4) == 1


def test_repetition_looks_at_prompt_and_output() -> None:
    assert greedy([3.0, 2.5, 0.0], prompt=(0,), repetition_penalty=1.5) == 1
    assert greedy([3.0, 2.5, 0.0], prompt=(), output=(0,), repetition_penalty=1.5) == 1
    assert greedy([-1.0, -1.2, -9.0], prompt=(0,), repetition_penalty=1.5) == 1


def test_the_least_repetition_penalty_overflows_nothing() -> None:
    """Logits of 1000 are beyond what models give; the coldest temperature divides once more."""
    params = {"repetition_penalty": 1e-6, "temperature": 1e-300}
    SamplingParams(max_tokens=1, seed=0, **params).validate(3)  # type: ignore[arg-type]
    assert sample(torch.tensor([[1.0, 1000.0, 900.0]]), [row(prompt=(1, 2), **params)])[0].token_id == 1


def test_repetition_does_not_make_the_prompt_count_for_the_other_two() -> None:
    assert greedy([3.0, 2.5, 0.0], prompt=(0, 0), repetition_penalty=1.01, presence_penalty=2.0) == 0
    assert greedy([3.0, 2.5, 0.0], prompt=(0, 0), repetition_penalty=1.01, frequency_penalty=2.0) == 0


def test_logit_bias_moves_a_token() -> None:
    assert greedy([3.0, 2.5, 0.0], logit_bias={2: 5.0}) == 2
    assert greedy([3.0, 2.5, 0.0], logit_bias={0: -100.0}) == 1


def test_no_ending_token_comes_before_min_tokens() -> None:
    ending = {"stop_token_ids": (0,), "eos_token_ids": (1, 10_000), "min_tokens": 2}  # one is beyond the vocabulary
    assert greedy([3.0, 2.5, 0.0], output=(9,), **ending) == 2
    assert greedy([3.0, 2.5, 0.0], output=(9, 9), **ending) == 0
    assert greedy([3.0, 2.5, 0.0], output=(9,), ignore_eos=True, **ending) == 1


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(2, VOCAB)
    expected = logits.double().log_softmax(dim=1)
    rows = [row(temperature=0.2, top_k=1, logit_bias={8: 100.0}, num_logprobs=3), row(num_logprobs=0)]
    biased, plain = sample(logits, rows)
    assert biased.token_id == 8
    assert biased.logprobs is not None
    assert plain.logprobs is not None
    assert biased.logprobs.logprob == pytest.approx(expected[0, 8].item(), abs=1e-5)
    best = expected[0].topk(3)
    assert biased.logprobs.top_token_ids == tuple(best.indices.tolist())
    assert biased.logprobs.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-5)
    assert plain.logprobs.top_token_ids == ()
    assert plain.logprobs.top_logprobs == ()
    assert plain.logprobs.logprob == pytest.approx(expected[1, plain.token_id].item(), abs=1e-5)


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(3, VOCAB)
    kept = logits.clone()
    sample(logits, [row(logit_bias={1: 3.0}, repetition_penalty=2.0, min_tokens=3, eos_token_ids=(2,))] * 3)
    assert torch.equal(logits, kept)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize("seed", range(5))
def test_penalties_know_what_was_drawn_before_the_host_does(seed: int) -> None:
    """Texts come and go; the sampler that saw each draw agrees with one that is told the whole text every time."""
    rng = random.Random(seed)
    sampler = Sampler(VOCAB, torch.device("cpu"))
    texts: dict[int, tuple[SamplingRow, list[int]]] = {}
    for number in range(60):
        for index in [index for index in texts if rng.random() < 0.1]:
            del texts[index]
        for _ in range(rng.randrange(3)):
            new = random_row(rng)
            texts[number * 3 + len(texts)] = (new, list(new.text.output_token_ids))
        logits = torch.randn(len(texts), VOCAB) * 3
        rows = [SamplingRow(row.params, row.text, len(output)) for row, output in texts.values()]
        told = [row_of(row.params, row.text.prompt_token_ids, tuple(output)) for row, output in texts.values()]
        drawn = sampler.draw(logits, rows).collect() if rows else []
        assert drawn == sample(logits, told)
        for (_, output), one in zip(texts.values(), drawn, strict=True):
            output.append(one.token_id)
    assert len(sampler._counts.in_output) <= 32, "rows of texts that are gone were not used again"


@pytest.mark.parametrize("operation", ["cat", "ones_like"])
def test_counts_for_which_there_was_no_memory_are_right_at_the_next_try(operation: str, monkeypatch) -> None:
    """A step for which there is no memory goes on without its newest request, and with what was counted before."""

    def refuse(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    counts = TokenCounts(VOCAB, torch.device("cpu"))
    texts = [WrittenText((index,), (index + 1,)) for index in range(9)]
    rows = [counts.row_of(text) for text in texts[:8]]
    with monkeypatch.context() as patched:
        patched.setattr(torch, operation, refuse)
        with pytest.raises(torch.OutOfMemoryError):
            counts.row_of(texts[8])
    rows.append(counts.row_of(texts[8]))
    assert len(set(rows)) == 9
    assert [counts.in_output[row].nonzero().tolist() for row in rows] == [[[index + 1]] for index in range(9)]
    assert [counts.in_prompt[row].nonzero().tolist() for row in rows] == [[[index]] for index in range(9)]


def test_a_draw_that_ran_out_of_memory_and_is_made_again_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 0 leads by 1.5: it is drawn twice, and not a third time, unless it was counted too often."""

    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError

    logits, sampler = torch.tensor([[3.0, 1.5, 0.0]]), Sampler(3, torch.device("cpu"))
    asking = row(temperature=0.0, frequency_penalty=1.0, num_logprobs=0)
    with monkeypatch.context() as patched:
        patched.setattr("engine.sampler.Logprobs", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            sampler.draw(logits, [asking])
    assert [sampler.draw(logits, [asking]).collect()[0].token_id for _ in range(3)] == [0, 0, 1]
