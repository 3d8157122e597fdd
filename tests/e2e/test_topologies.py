"""Every shape of cluster gives the very tokens that transformers gives, and its pools are whole afterwards."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster_process import ClusterProcess
from tests.e2e.conftest import Truth

TOPOLOGIES = {
    "1P1D": ("cpu_1p1d.yaml", ()),
    "2P2D in chunks, and little room": (
        "cpu_2p2d.yaml",
        (
            "prefill.batch_tokens=32",
            "prefill.outbox_share=0.01",
            "decode.growth_tokens=16",
            "decode.parked_memory=1GiB",
        ),
    ),
    "colocated": ("cpu_colocated.yaml", ()),
    "TP1 to TP2, blocks of 16 to 32": ("cpu_tp2.yaml", ()),
    "TP2 to TP1 over gloo, blocks of 32 to 16": (
        "cpu_tp2.yaml",
        (
            *("prefill.tensor_parallel=2", "decode.tensor_parallel=1", "kv_transfer.transport=gloo"),
            *("prefill.kv_cache.block_size=32", "decode.kv_cache.block_size=16"),
        ),
    ),
    "TP2 to TP4": ("cpu_tp2.yaml", ("prefill.tensor_parallel=2", "decode.tensor_parallel=4")),
}

STORY = "Once upon a time there was a lighthouse keeper who counted the ships that passed. "
PROMPTS = ("A", "The old sailor said", STORY, STORY * 3, "What is the name of the keeper?", STORY[::-1])
NUM_TOKENS = 24


@pytest.fixture(scope="module", params=TOPOLOGIES)
def cluster(request: pytest.FixtureRequest, model: Path) -> Iterator[ClusterProcess]:
    config, overrides = TOPOLOGIES[request.param]
    running = ClusterProcess(config, model, *overrides)
    yield running
    running.tear_down()


def complete(cluster: ClusterProcess, prompt: list[int]) -> list[int]:
    answer = cluster.client().completions.create(
        model=cluster.model,
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.choices[0].finish_reason == "length"
    return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_concurrent_requests_get_the_tokens_of_transformers_and_the_pools_are_whole_afterwards(
    cluster: ClusterProcess, tokenize: Callable[[str], list[int]], truth: Truth
):
    prompts = [tokenize(text) for text in PROMPTS] * 2
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: complete(cluster, prompt), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == truth(prompt, NUM_TOKENS)
    cluster.wait_until_pools_whole()


@pytest.mark.slow
def test_a_chat_streams_the_text_that_it_gives_at_once(cluster: ClusterProcess):
    asked: dict[str, Any] = {
        "model": cluster.model,
        "messages": [{"role": "user", "content": "Who keeps the lighthouse?"}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
    }
    whole = cluster.client().chat.completions.create(**asked).choices[0]
    chunks = list(cluster.client().chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        whole.finish_reason
    ]
    cluster.wait_until_pools_whole()
