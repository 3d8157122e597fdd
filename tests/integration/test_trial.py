"""The first step of a life: weights that are no numbers are refused by name, and a slow machine is given its time."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import trial
from engine.limits import Limits
from engine.trial import try_out
from protocol.errors import ConfigError
from protocol.messages import RoleName
from protocol.orders import Batch
from tests.models import make_model
from tests.worker_cluster import WorkerCluster

WEIGHTS = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("groups", [[("colocated", 1, 1)], [("prefill", 1, 2), ("decode", 1, 1)]], ids=["one", "three"])
def test_a_weight_that_is_not_a_number_is_refused_before_anybody_is_served(
    name: str, groups: list[tuple[RoleName, int, int]], tmp_path: Path
) -> None:
    file = make_model("llama", tmp_path, num_hidden_layers=2) / "model.safetensors"
    tensors = load_file(file)
    tensors[name][-1, -1] = torch.nan
    save_file(tensors, file)
    cluster = WorkerCluster(tmp_path, groups)
    with pytest.raises(AssertionError, match="ConfigError"):
        cluster.__enter__()
    cluster.let_all_fail()
    refusals = [error for error in cluster.errors if isinstance(error, ConfigError)]
    assert refusals
    assert all("the model's output is not finite" in str(error) for error in refusals)


class SlowEngine:
    """An engine whose layers take a second for each token, on a clock that a test owns."""

    is_asynchronous = False
    device = torch.device("cpu")
    vocab_size = 100
    kv_cache = SimpleNamespace(scratch_block=0)

    def __init__(self) -> None:
        self.now_s = 0.0

    def forward(
        self, batch: Batch, drawn: None = None, layers_done: Callable[[int], None] = lambda num: None
    ) -> torch.Tensor:
        for layer in range(8):
            self.now_s += len(batch.token_ids)
            layers_done(layer + 1)
        return torch.zeros(1, 100)


def test_what_a_layer_of_the_largest_step_takes_is_reckoned_from_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = SlowEngine()
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: engine.now_s))
    assert try_out(engine, Limits(batch_tokens=8192, max_context=4096), block_size=16) == pytest.approx(8192)
    assert engine.now_s < 1000
