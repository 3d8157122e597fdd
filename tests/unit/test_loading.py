"""A rank that gets ready: what it says of its model, so that only equal models pair, and only equal ranks group."""

import json
from pathlib import Path
from shutil import copytree

import pytest

from models.tensor_parallel import TensorParallel
from protocol.errors import ConfigError
from protocol.layout import KVLayout
from protocol.progress import Tell, say_nothing
from protocol.secret import new_secret
from protocol.topology import DecodeSection, KVTransferSection
from tests.models import make_model
from tests.ranks import run_ranks
from worker.launch import CacheLaunch, ModelLaunch, WorkerLaunch
from worker.loading import load_rank


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "model", num_hidden_layers=1)


def layout_of(folder: Path, tensor_parallel: TensorParallel, progress: Tell = say_nothing) -> KVLayout:
    launch = WorkerLaunch(
        role="decode",
        group=0,
        rank=tensor_parallel.rank,
        model=ModelLaunch(str(folder), "auto", 512),
        role_section=DecodeSection(tensor_parallel=tensor_parallel.size),
        kv_cache=CacheLaunch(1 << 20, 0.0, 16, prefix_caching=True),
        kv_transfer=KVTransferSection(transport="zmq"),
        device="cpu",
        control="",
        secret=new_secret(),
        host="127.0.0.1",
    )
    loaded = load_rank(launch, tensor_parallel, progress, lambda: None)
    loaded.rank.mover.close()
    return loaded.layout


def with_one_weight_changed(folder: Path) -> Path:
    changed = copytree(folder, folder.parent / "changed")
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    return changed


def test_a_worker_that_comes_back_with_one_weight_changed_does_not_fit_the_others(folder: Path) -> None:
    alone = TensorParallel(0, 1)
    before, after = layout_of(folder, alone), layout_of(with_one_weight_changed(folder), alone)
    assert layout_of(folder, alone).incompatibility(before) is None
    assert (after.incompatibility(before) or "").startswith("model_hash differs: ")


def test_weights_that_are_replaced_while_they_are_loaded_are_not_served(folder: Path) -> None:
    changed = with_one_weight_changed(folder) / "model.safetensors"

    def replace(doing: str) -> None:
        if doing.startswith("weights 1"):
            changed.replace(folder / "model.safetensors")

    with pytest.raises(ConfigError, match=r"model\.safetensors changed while this model was loaded from it"):
        layout_of(folder, TensorParallel(0, 1), replace)


def test_a_wrong_checkpoint_is_refused_before_its_bytes_are_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 516}))
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"has shape \(515, 128\); config.json calls for \(516, 128\)"):
        layout_of(folder, TensorParallel(0, 1), told.append)
    assert told == []


def test_groups_of_different_sizes_fit_when_their_models_are_equal(folder: Path) -> None:
    alone = layout_of(folder, TensorParallel(0, 1))
    for layout in run_ranks(2, lambda group: layout_of(folder, group)):
        assert layout.incompatibility(alone) is None


def test_ranks_with_different_models_make_no_group(folder: Path) -> None:
    folders = [folder, with_one_weight_changed(folder)]
    told: list[str] = []

    def load(group: TensorParallel) -> None:
        with pytest.raises(ConfigError, match="the ranks of this group have different models") as refused:
            layout_of(folders[group.rank], group)
        told.append(str(refused.value))

    run_ranks(2, load)
    assert len(set(told)) == 2, "each tells its own fingerprint"
