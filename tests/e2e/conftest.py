"""The model that is served, what transformers makes of it (the truth that every cluster is held to), and a token for
Ray clusters.
"""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def ray_environment() -> Iterator[dict[str, str]]:
    """What nodes and clients of a Ray cluster share: a token of their own, and nothing of the user's other clusters."""
    home = Path(tempfile.mkdtemp(prefix="tandem-", dir="/tmp"))  # short, for Ray puts sockets below it
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    yield {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    shutil.rmtree(home)
