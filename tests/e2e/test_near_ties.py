"""One prefill and one decode worker on one GPU under Ray, held to transformers' greedy tokens on the same device.

Two programs that add in another order give slightly other logits, so tokens are compared up to the first near-tie: the
first position where transformers' two best logits are no further apart than rounding moves them. From there on two
right answers may differ. The texts must be such that this comes late.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cluster_process import ClusterProcess

NOISE = {"float32": 1e-3, "bfloat16": 0.26}
"""Logits of the demo model, where they decide, are about 16; below that the numbers of bfloat16 are 1/16 apart. Either
of two logits may be two of these steps off, as those of transformers are between a prompt and single tokens."""
BEGINNINGS = (
    "Once upon a time, there was a {} named Noah. He lived in the deep blue sea. One morning,",
    "Once upon a time, there was a {} named Mia. She lived at the edge of a deep forest. She had a red kite that she "
    "loved more than anything else. One cold day,",
    "There once was a {} named Tom. Tom lived in a small house by the sea. One day,",
    "Once upon a time, there was a {} called Leo. Leo and his friend",
)
HEROES = ("fox", "girl", "king", "owl")
NUM_TOKENS = 96
MEAN_NEAR_TIE = 32

ON_GPU = ("device=cuda", "prefill.gpus=0.25", "decode.gpus=0.25", "kv_cache.memory=1GiB")


@dataclass(frozen=True)
class Case:
    """dtype and device of both sides."""

    dtype: str
    device: str

    @property
    def overrides(self) -> tuple[str, ...]:
        return (f"model.dtype={self.dtype}", *(ON_GPU if self.device == "cuda" else ()))


CASES = [
    pytest.param(Case("float32", "cuda"), marks=pytest.mark.gpu, id="float32 on a GPU"),
    pytest.param(Case("bfloat16", "cuda"), marks=pytest.mark.gpu, id="bfloat16 on a GPU"),
    pytest.param(Case("bfloat16", "cpu"), id="bfloat16 on a CPU"),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture(scope="module")
def cluster(case: Case, model: Path) -> Iterator[ClusterProcess]:
    running = ClusterProcess("cpu_1p1d.yaml", model, *case.overrides)
    yield running
    running.tear_down()


@pytest.fixture(scope="module")
def reference(case: Case, model: Path) -> Callable[[list[int]], tuple[list[int], int]]:
    """Return transformers' greedy tokens after a prompt, and the place of the first near-tie among them."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, case.dtype)).eval().to(case.device)

    @torch.inference_mode()
    def generate(prompt: list[int]) -> tuple[list[int], int]:
        ids = torch.tensor([prompt], device=case.device)
        made: Any = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(made.logits).float().topk(2).values  # [NUM_TOKENS, 2]
        is_near = (best[:, 0] - best[:, 1] < NOISE[case.dtype]).tolist()
        near_tie = is_near.index(True) if True in is_near else NUM_TOKENS
        return made.sequences[0, len(prompt) :].tolist(), near_tie

    return generate


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_up_to_the_first_near_tie(
    cluster: ClusterProcess,
    tokenize: Callable[[str], list[int]],
    reference: Callable[[list[int]], tuple[list[int], int]],
):
    prompts = [tokenize(beginning.format(hero)) for beginning in BEGINNINGS for hero in HEROES]
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(lambda prompt: complete(cluster, prompt), prompts))
    near_ties = []
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, near_tie = reference(prompt)
        assert len(answer) == NUM_TOKENS
        assert answer[:near_tie] == expected[:near_tie]
        near_ties.append(near_tie)
    assert sum(near_ties) / len(near_ties) >= MEAN_NEAR_TIE, near_ties
    cluster.wait_until_pools_whole()


@pytest.mark.slow
def test_a_chat_streams_the_text_that_it_gives_at_once(cluster: ClusterProcess):
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    asked: dict[str, Any] = {"model": cluster.model, "messages": messages, "max_tokens": 48, "temperature": 0}
    whole = cluster.client().chat.completions.create(**asked).choices[0].message.content
    chunks = list(cluster.client().chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert whole
    cluster.wait_until_pools_whole()


def complete(cluster: ClusterProcess, prompt: list[int]) -> list[int]:
    answer = cluster.client().completions.create(
        model=cluster.model,
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]
