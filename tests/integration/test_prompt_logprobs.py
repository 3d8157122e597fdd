"""Log probabilities of a prompt's own tokens, at every position, equal transformers' on every topology."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from protocol.messages import RoleName
from protocol.request import MAX_LOGPROBS, SamplingParams
from tests.models import make_model, reference_model
from tests.worker_cluster import Answer, WorkerCluster

TOPOLOGIES: dict[str, list[tuple[RoleName, int, int]]] = {
    "colocated": [("colocated", 1, 1)],
    "TP1-TP2": [("prefill", 1, 1), ("decode", 1, 2)],
}
ASKING = SamplingParams(4, seed=0, temperature=0.0, num_prompt_logprobs=2, repetition_penalty=1.4)
PLAIN = SamplingParams(4, seed=0, temperature=0.0, repetition_penalty=1.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(params=TOPOLOGIES)
def cluster(model: Path, request: pytest.FixtureRequest) -> Iterator[WorkerCluster]:
    with WorkerCluster(model, TOPOLOGIES[request.param], batch_tokens=64, batch_requests=40) as cluster:
        yield cluster


@torch.inference_mode()
def expected(model: Path, prompt: list[int]) -> torch.Tensor:
    """Return [len(prompt), vocab_size]: what transformers thinks of the token behind each position."""
    return reference_model(model)(torch.tensor([prompt])).logits[0].float().log_softmax(-1)


def positions(answer: Answer) -> list[int]:
    return [part.first_position + index for part in answer.prompt for index in range(len(part.logprobs))]


def test_every_position_of_a_prompt_has_its_log_probabilities_also_where_a_prefix_is_cached(
    cluster: WorkerCluster, model: Path
) -> None:
    prompt = random.Random(2).choices(range(500), k=150)
    logprobs = expected(model, prompt)
    plain = cluster.submit(prompt, PLAIN).result(20)
    for _ in range(2):
        others = [cluster.submit(prompt[: 30 + index], PLAIN) for index in range(4)]
        answer = cluster.submit(prompt, ASKING).result(20)
        assert [other.result(20).outcome.code for other in others] == ["length"] * 4
        assert answer.token_ids == plain.token_ids, "asking changes nothing"
        assert positions(answer) == list(range(1, len(prompt)))
        said = [position for part in answer.prompt for position in part.logprobs]
        for position, of_token in enumerate(said, start=1):
            best = logprobs[position - 1].topk(2)
            assert of_token.logprob == pytest.approx(float(logprobs[position - 1, prompt[position]]), abs=1e-3)
            assert of_token.top_token_ids == tuple(best.indices.tolist())
            assert of_token.top_logprobs == pytest.approx(tuple(best.values.tolist()), abs=1e-3)


def test_those_of_a_long_chunk_come_whole_although_the_router_takes_no_long_messages(model: Path) -> None:
    prompt = random.Random(3).choices(range(500), k=500)
    most = SamplingParams(1, seed=0, temperature=0.0, num_prompt_logprobs=MAX_LOGPROBS)
    with WorkerCluster(model, TOPOLOGIES["colocated"], batch_tokens=1024) as cluster:
        answer = cluster.submit(prompt, most).result(20)
        assert len(answer.prompt) == 2, "one chunk, in two messages"
        assert positions(answer) == list(range(1, len(prompt)))
