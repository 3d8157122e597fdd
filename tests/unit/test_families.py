"""config.json as transformers writes it, of today and of old, into what the engine builds from."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from models.loading import FAMILIES as SERVED
from models.loading import load_model
from models.spec import Llama3Scaling, ModelSpec, RopeSpec
from protocol.errors import ConfigError
from tests.models import FAMILIES, make_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
MODEL_TYPES |= {"Qwen3ForCausalLM": "qwen3", "Phi3ForCausalLM": "phi3"}


def load(folder: Path, **changes: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return load_model(folder)


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load(folder, **changes)
    return str(refused.value)


def test_a_family_is_a_short_file() -> None:
    lengths = {name: len(Path(inspect.getfile(read)).read_text().splitlines()) for name, read in SERVED.items()}
    assert max(lengths.values()) <= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_understood(family: str, tmp_path: Path) -> None:
    overrides = {"attention_bias": True} if family == "llama" else {}
    model = load_model(make_model(family, tmp_path, eos_token_id=[7, 9], tie_word_embeddings=False, **overrides))
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ends = {"model.embed_tokens.weight": (515, 128), "lm_head.weight": (515, 128)}
    assert model.decoder.tensors() | ends == written
    facts, attention = model.facts, model.decoder.layers[-1].attention
    assert (attention.heads.number, facts.num_kv_heads, facts.num_layers, facts.vocab_size) == (4, 2, 3, 515)
    assert facts.head_dim == attention.head_dim == attention.rope.head_dim == (48 if family == "qwen3" else 32)
    assert attention.rope.scaling == (Llama3Scaling(8.0, 1.0, 4.0, 128) if family == "llama3_rope" else None)
    assert facts.eos_token_ids == (7, 9)


def test_a_config_of_old_is_understood(tmp_path: Path) -> None:
    model = load(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3_SCALING)
    facts, attention = model.facts, model.decoder.layers[0].attention
    assert attention.rope == RopeSpec(500000.0, 16, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert (facts.num_kv_heads, facts.head_dim, facts.dtype, facts.eos_token_ids) == (4, 16, "bfloat16", (2,))
    assert not model.decoder.vocabulary.is_tied


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_what_a_file_leaves_out_is_what_transformers_takes(architecture: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 32}
    model = load(tmp_path, architectures=[architecture], **sizes)
    keys = {key: value for key, value in (LLAMA | sizes).items() if key not in ("architectures", "torch_dtype")}
    theirs = AutoConfig.for_model(MODEL_TYPES[architecture], **keys)
    assert model.facts.num_kv_heads == theirs.num_key_value_heads
    assert model.facts.head_dim == getattr(theirs, "head_dim", 8)
    assert model.decoder.layers[0].attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert model.decoder.layers[0].attention.window == getattr(theirs, "sliding_window", None)
    assert model.decoder.vocabulary.is_tied == theirs.tie_word_embeddings


def test_of_two_ropes_the_older_key_counts_as_in_transformers(tmp_path: Path) -> None:
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": LLAMA3_SCALING}
    theirs = AutoConfig.for_model("llama", **both).rope_parameters
    rope = load(tmp_path, **both).decoder.layers[0].attention.rope
    assert rope.scaling is not None
    assert (rope.scaling.factor, rope.theta) == (theirs["factor"], theirs["rope_theta"])


MISTRAL, QWEN2, PHI3 = (
    {"architectures": [f"{name}ForCausalLM"], "num_key_value_heads": 2} for name in ("Mistral", "Qwen2", "Phi3")
)
USED = QWEN2 | {"sliding_window": 512, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("keys", "max_context"),
    [
        (MISTRAL | {"sliding_window": 512}, 512),
        (MISTRAL | {"sliding_window": None}, 2048),
        (PHI3 | {"sliding_window": 512}, 512),
        (QWEN2 | {"sliding_window": 512, "use_sliding_window": False}, 2048),
        (USED | {"max_window_layers": 1}, 512),
        (USED | {"max_window_layers": 0}, 512),
        (USED | {"max_window_layers": 2}, 2048),
        (USED | {"layer_types": ["full_attention", "sliding_attention"]}, 512),
        (USED | {"layer_types": ["full_attention", "full_attention"], "max_window_layers": 0}, 2048),
        ({"sliding_window": 512, "use_sliding_window": True}, 2048),  # a Llama has none
    ],
)
def test_a_sliding_window_shortens_the_context_and_says_so(
    keys: dict[str, Any], max_context: int, tmp_path: Path
) -> None:
    facts = load(tmp_path, **keys).facts
    assert facts.max_context == max_context
    assert ("512 of the model's 2,048 tokens" in facts.shortened_context) == (max_context == 512)


def test_a_window_may_be_in_some_layers_only(tmp_path: Path) -> None:
    layers = load(tmp_path, **USED, max_window_layers=1).decoder.layers
    assert [layer.attention.window for layer in layers] == [None, 512]


@pytest.mark.parametrize(("written", "served"), [("torch.bfloat16", "bfloat16"), ("float32", "float32")])
def test_a_type_may_be_written_as_torch_prints_it(written: str, served: str, tmp_path: Path) -> None:
    assert load(tmp_path, dtype=written).facts.served_dtype("auto") == served


def test_a_type_that_is_not_served_needs_another_by_name(tmp_path: Path) -> None:
    facts = load(tmp_path, dtype="torch.float64").facts
    assert facts.served_dtype("bfloat16") == "bfloat16"
    with pytest.raises(ConfigError, match=r"dtype float64 is not served; set model\.dtype to one of float32, bfloat16"):
        facts.served_dtype("auto")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not served"),
        ({"hidden_act": "gelu"}, "hidden_act is served as silu only, not 'gelu'"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer, not 'big'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not served"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is served as 1.0 only, not 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor is served as"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type yarn is not served"),
        (PHI3 | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope type longrope is not served"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "a rope for each kind of layer is not served"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor must be a positive number, not None",
        ),
        (
            {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}},
            "high_freq_factor must be above low_freq_factor",
        ),
        ({"num_key_value_heads": 3}, r"num_key_value_heads must divide num_attention_heads \(4\), not 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        (USED | {"layer_types": ["full_attention"]}, "layer_types must say full_attention or sliding_attention"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": {"a": 1}},
        {"num_key_value_heads": "2"},
        {"num_key_value_heads": True},
        {"num_hidden_layers": 10**12},
        {"vocab_size": 10**400},
        {"max_position_embeddings": None},
        {"head_dim": [16]},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 10**400},
        {"rope_theta": "1e6"},
        {"rope_scaling": ["llama3"]},
        {"rope_scaling": LLAMA3_SCALING | {"factor": "much"}},
        {"attention_bias": "no"},
        {"tie_word_embeddings": 1},
        {"torch_dtype": 16},
        {"eos_token_id": "</s>"},
        {"eos_token_id": ["</s>"]},
        {"eos_token_id": [-1]},
        {"eos_token_id": {"a": [[[[[[[[[[[[]]]]]]]]]]]]}},
    ],
)
def test_a_value_of_another_kind_is_refused_by_file_and_key(changes: dict[str, Any], tmp_path: Path) -> None:
    told = refusal(tmp_path, **changes)
    [(key, value)] = changes.items()
    assert str(tmp_path / "config.json") in told
    assert ("factor" if isinstance(value, dict) and "factor" in value else key) in told
    assert len(told) < 400


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "nonsense", "[]", '"a"', "\ud800".encode("utf-8", "surrogatepass")]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_holds_no_object_is_refused_by_name(name: str, content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=rf"/{name} (is not JSON|is nested too deep|must hold one JSON object)"):
        load_model(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_model(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: Is a directory"):
        load_model(tmp_path)
