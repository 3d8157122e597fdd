"""Checkpoints: each rank reads exactly its slices, and what does not fit is refused by name before anything is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import linear
from kernels.backend import operations_for
from models.decoder import Decoder, load_decoder
from models.loading import load_model
from models.tensor_parallel import TensorParallel
from protocol.errors import ConfigError
from tests.models import make_model, reference_model

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


def load(
    folder: Path,
    rank: int = 0,
    size: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda doing: None,
) -> Decoder:
    spec = load_model(folder).decoder
    return load_decoder(folder, spec, dtype, CPU, Rank(rank, size), operations_for(CPU), progress)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_the_slices_of_all_ranks_make_up_the_whole(family: str, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    ranks = [load(folder, rank, 4) for rank in range(4)]
    layers = [rank.layers[1] for rank in ranks]
    whole = apart({name.removeprefix("model.layers.1."): tensor for name, tensor in tensors.items()})
    head_dim = 32
    for rank, layer in enumerate(layers):
        q, k, v = layer.attention.qkv.local.weight.split(head_dim)  # one head of each
        kv_rows = slice(rank // 2 * head_dim, (rank // 2 + 1) * head_dim)  # two ranks share a KV head
        assert torch.equal(q, whole["self_attn.q_proj.weight"][rank * head_dim : (rank + 1) * head_dim])
        assert torch.equal(k, whole["self_attn.k_proj.weight"][kv_rows])
        assert torch.equal(v, whole["self_attn.v_proj.weight"][kv_rows])
        bias = layer.attention.qkv.local.bias
        assert (bias is None) == (family == "phi3")
        assert bias is None or torch.equal(bias[2 * head_dim :], whole["self_attn.v_proj.bias"][kv_rows])
    outs, downs = zip(*((layer.attention.o.local.weight, layer.mlp.down.local.weight) for layer in layers), strict=True)
    assert torch.equal(torch.cat(outs, dim=1), whole["self_attn.o_proj.weight"])
    assert torch.equal(torch.cat(downs, dim=1), whole["mlp.down_proj.weight"])
    gates, ups = zip(*(layer.mlp.gate_up.local.weight.chunk(2) for layer in layers), strict=True)
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


def apart(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take apart what a family fuses: 4 heads of 32 over 2 KV heads, 192 features."""
    for fused, names, sizes in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), [128, 64, 64]),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), [192, 192]),
    ):
        if (weight := layer.pop(f"{fused}.weight", None)) is not None:
            parts = weight.split(sizes)
            layer |= {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return layer


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    decoder = load(make_model("llama", tmp_path, tie_word_embeddings=True))
    assert decoder.embedding.weight is decoder.head.local.weight


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({HEAD: torch.randn(515, 128)}),
        lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
        lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
    ],
    ids=["a head of its own", "the same head", "the head alone"],
)
def test_a_tied_model_has_the_ends_that_transformers_gives_it(
    change: Callable[[dict[str, Tensor]], object], tmp_path: Path
) -> None:
    folder = make_model("llama", tmp_path, tie_word_embeddings=True)
    rewrite(folder, change)
    ours, theirs = load(folder), reference_model(folder)
    assert torch.equal(ours.embedding.weight, theirs.get_input_embeddings().weight)
    assert torch.equal(ours.head.local.weight, theirs.get_output_embeddings().weight)
    is_one = HEAD not in load_file(folder / "model.safetensors") or torch.equal(
        ours.embedding.weight, ours.head.local.weight
    )
    assert (ours.embedding.weight is ours.head.local.weight) == is_one


def test_an_untied_model_needs_a_head_and_a_tied_one_either_end(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(ConfigError, match=f"tensor {EMBEDDING} of shape .* is missing"):
        load(folder)


def test_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    load(folder)


def test_weights_are_converted_to_the_wanted_type(tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path)
    decoder = load(folder, 0, 2, torch.bfloat16)
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    assert attention.q_norm is not None
    for part in (attention.q_norm, attention.qkv.local, mlp.down.local, decoder.head.local):
        assert part.weight.dtype == torch.bfloat16


def test_progress_counts_the_parts(tmp_path: Path) -> None:
    doing: list[str] = []
    load(make_model("llama", tmp_path), progress=doing.append)
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
    assert torch.equal(load(folder).layers[2].mlp.down.local.weight, with_index.layers[2].mlp.down.local.weight)


def test_new_weights_beside_an_older_index_are_refused_by_both_names(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    make_model("llama", tmp_path / "new", seed=1)
    (tmp_path / "new" / "model.safetensors").rename(folder / "model.safetensors")
    told = r"model.safetensors and other weights that model.safetensors.index.json names \(model-00001-of-"
    with pytest.raises(ConfigError, match=told):
        load(folder)


def test_new_weights_beside_the_index_of_shards_that_are_gone_are_served(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    make_model("llama", tmp_path / "new", seed=1)
    (tmp_path / "new" / "model.safetensors").rename(folder / "model.safetensors")
    assert torch.equal(load(folder).head.local.weight, reference_model(folder).get_output_embeddings().weight)


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    shards = sorted(folder.glob("*.safetensors"))
    for shard in (shards[0], shards[-1]):
        tensors = load_file(shard)
        if "model.norm.weight" not in tensors:
            save_file(tensors | {"model.norm.weight": torch.full((128,), 5.0)}, shard)
    assert not (load(folder).final_norm.weight == 5).any()
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = next(
        shard.name for shard in shards if (load_file(shard).get("model.norm.weight", torch.zeros(1)) == 5).all()
    )
    index.write_text(json.dumps(content))
    assert (load(folder).final_norm.weight == 5).all()


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.norm.weight"] = next(
        n for n in names if n != content["weight_map"]["model.norm.weight"]
    )
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"holds no tensor model.norm.weight, though the index says so"):
        load(folder)


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


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}', "nonsense", "[" * 100_000],
)
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
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors"):
        load(folder)


def test_only_the_own_slice_of_a_matrix_is_read(tmp_path: Path) -> None:
    """A rank of four holds a quarter of every matrix, and not a view that keeps the whole alive."""
    folder = make_model("llama", tmp_path)
    layer = load(folder, 1, 4).layers[0]
    for part, num_elements in ((layer.attention.o, 128 * 32), (layer.mlp.down, 128 * 48)):
        assert part.local.weight.untyped_storage().nbytes() == num_elements * 4


def test_the_index_alone_says_which_files_count(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_shard_size="200KB")
    save_file({"another.name": torch.ones(1)}, folder / "consolidated.safetensors")
    load(folder)
    assert "another.name" not in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
