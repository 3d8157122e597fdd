"""The model that is served, and what transformers makes of it: the truth that every cluster is held to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cluster_process import ROOT

Truth = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Path:
    folder = ROOT / str(request.config.getoption("--model"))
    assert (folder / "config.json").exists(), f"{folder} holds no model"
    return folder


@pytest.fixture(scope="session")
def tokenize(model: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="session")
def truth(model: Path) -> Truth:
    """Greedy tokens of transformers for a prompt's token ids, whatever token ends a text left out of account."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        with torch.inference_mode():
            made = network.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [int(token) for token in made[0, len(prompt) :]]

    return generate
