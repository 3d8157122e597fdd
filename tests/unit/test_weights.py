"""Checkpoints: each rank reads exactly its slices, and what does not fit is refused by name before anything is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.tensor_parallel import TensorParallel
from engine.weights import ModelWeights, expected_tensors, load_weights
from kernels import linear
from protocol.errors import ConfigError
from protocol.model_config import load_model_config
from tests.models import make_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights cannot be looked into."""
    monkeypatch.setattr(linear, "_pack", lambda weight: None)


class Rank(TensorParallel):
    """A rank that never meets the others."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(0, 1)
        self.rank, self.size = rank, size


def load(folder: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_weights(folder, load_model_config(folder), dtype, CPU, Rank(rank, size), lambda doing: None)


def progress_of_loading(folder: Path) -> list[str]:
    doing: list[str] = []
    load_weights(folder, load_model_config(folder), torch.float32, CPU, Rank(0, 1), doing.append)
    return doing


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_expected_tensors_are_those_that_transformers_writes(tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path, attention_bias=True)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert expected_tensors(load_model_config(folder)) == written


def test_the_slices_of_all_ranks_make_up_the_whole(tmp_path: Path) -> None:
    folder = make_model("qwen2", tmp_path, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    ranks = [load(folder, rank, 4) for rank in range(4)]
    layers = [rank.layers[1] for rank in ranks]
    whole = {name.removeprefix("model.layers.1."): tensor for name, tensor in tensors.items()}
    head_dim = 32
    for rank, layer in enumerate(layers):
        q, k, v = layer.qkv.local.weight.split(head_dim)  # one head of each
        kv_rows = slice(rank // 2 * head_dim, (rank // 2 + 1) * head_dim)  # two ranks share a KV head
        assert torch.equal(q, whole["self_attn.q_proj.weight"][rank * head_dim : (rank + 1) * head_dim])
        assert torch.equal(k, whole["self_attn.k_proj.weight"][kv_rows])
        assert torch.equal(v, whole["self_attn.v_proj.weight"][kv_rows])
        assert layer.qkv.local.bias is not None
        assert torch.equal(layer.qkv.local.bias[2 * head_dim :], whole["self_attn.v_proj.bias"][kv_rows])
    assert torch.equal(torch.cat([layer.o.local.weight for layer in layers], dim=1), whole["self_attn.o_proj.weight"])
    assert torch.equal(torch.cat([layer.down.local.weight for layer in layers], dim=1), whole["mlp.down_proj.weight"])
    gates, ups = zip(*(layer.gate_up.local.weight.chunk(2) for layer in layers), strict=True)
    assert torch.equal(torch.cat(gates), whole["mlp.gate_proj.weight"])
    assert torch.equal(torch.cat(ups), whole["mlp.up_proj.weight"])
    for name, shards in (
        ("model.embed_tokens.weight", [rank.embedding.weight for rank in ranks]),
        ("lm_head.weight", [rank.head.local.weight for rank in ranks]),
    ):
        assert {len(shard) for shard in shards} == {129}  # 515 over 4, rounded up
        joined = torch.cat(shards)
        assert torch.equal(joined[:515], tensors[name])
        assert not joined[515:].any()


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    weights = load(make_model("llama", tmp_path, tie_word_embeddings=True))
    assert weights.embedding.weight is weights.head.local.weight


def test_a_tied_models_copy_of_the_head_and_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, tie_word_embeddings=True)
    extra = {"lm_head.weight": torch.ones(515, 128), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    assert not torch.equal(load(folder).head.local.weight, extra["lm_head.weight"])


def test_weights_are_converted_to_the_wanted_type(tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path)
    weights = load(folder, 0, 2, torch.bfloat16)
    layer = weights.layers[0]
    assert layer.q_norm is not None
    for tensor in (layer.q_norm, layer.qkv.local.weight, layer.down.local.weight, weights.head.local.weight):
        assert tensor.dtype == torch.bfloat16


def test_progress_counts_the_parts(tmp_path: Path) -> None:
    doing = progress_of_loading(make_model("llama", tmp_path))
    assert doing == ["weights 1 of 4", "weights 2 of 4", "weights 3 of 4", "weights 4 of 4"]


def add_fp8(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("lm_head.weight"), r"tensor lm_head.weight of shape \(515, 128\) is missing"),
        (lambda t: t.update({"model.layers.3.x": torch.ones(1)}), r"hold tensor model.layers.3.x, which config.json"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(191, 128)}),
            r"model.layers.1.mlp.up_proj.weight has shape \(191, 128\); config.json calls for \(192, 128\)",
        ),
        (add_fp8, r"model.norm.weight is of type F8_E4M3; served are F64, F32, F16, BF16"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], complaint: str, tmp_path: Path
) -> None:
    folder = make_model("llama", tmp_path)
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=complaint):
        load(folder)


def test_several_files_need_no_index(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    with_index = load(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(load(folder).layers[2].down.local.weight, with_index.layers[2].down.local.weight)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
    with pytest.raises(ConfigError, match=r"b.safetensors: tensor model.norm.weight is in another file"):
        load(folder)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ConfigError, match=f"{lost.name} is missing; model.safetensors.index.json names it"):
        load(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "nonsense"])
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="is not an index of safetensors files"):
        load(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model.safetensors is not a readable safetensors file"):
        load(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors file"):
        load(folder)


def test_only_the_own_slice_of_a_matrix_is_read(tmp_path: Path) -> None:
    """A rank of four holds a quarter of every matrix, and not a view that keeps the whole alive."""
    folder = make_model("llama", tmp_path)
    layer = load(folder, 1, 4).layers[0]
    for matrix, num_elements in ((layer.o.local.weight, 128 * 32), (layer.down.local.weight, 128 * 48)):
        assert matrix.untyped_storage().nbytes() == num_elements * 4


def test_the_index_alone_says_which_files_count(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    save_file({"another.name": torch.ones(1)}, folder / "consolidated.safetensors")
    load(folder)
    assert "another.name" not in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
