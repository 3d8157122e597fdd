"""config.json as transformers writes it, of today and of old, into what the engine builds from."""

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError
from protocol.model_config import ModelConfig, RopeConfig, load_model_config
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


def load(folder: Path, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return load_model_config(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_understood(family: str, tmp_path: Path) -> None:
    config = load_model_config(make_model(family, tmp_path, eos_token_id=[7, 9]))
    assert (config.num_heads, config.num_kv_heads, config.num_layers) == (4, 2, 3)
    assert config.head_dim == (48 if family == "qwen3" else 32)
    assert config.qkv_bias == (family == "qwen2")
    assert not config.o_bias
    assert not config.mlp_bias
    assert config.qk_norm == (family == "qwen3")
    assert config.rope.factor == (8.0 if family == "llama3_rope" else None)
    assert config.eos_token_ids == (7, 9)


def test_a_config_of_old_is_understood(tmp_path: Path) -> None:
    config = load(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3_SCALING)
    assert config.rope == RopeConfig(500000.0, 8.0, 1.0, 4.0, 8192)
    assert (config.num_kv_heads, config.head_dim, config.dtype, config.eos_token_ids) == (4, 16, "bfloat16", (2,))
    assert not config.tie_word_embeddings


def test_a_sliding_window_shortens_the_context(tmp_path: Path) -> None:
    assert load(tmp_path, architectures=["MistralForCausalLM"], sliding_window=512).max_context == 512
    assert load(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None).max_context == 2048
    unused = {"sliding_window": 512, "use_sliding_window": False}
    assert load(tmp_path, architectures=["Qwen2ForCausalLM"], **unused).max_context == 2048


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not served"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not served"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer, not 'big'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not served"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not served"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type yarn is not served"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor"),
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
        {"head_dim": [16]},
        {"rms_norm_eps": None},
        {"rope_scaling": ["llama3"]},
        {"rope_scaling": LLAMA3_SCALING | {"factor": "much"}},
        {"eos_token_id": "</s>"},
        {"eos_token_id": ["</s>"]},
    ],
)
def test_a_value_of_another_kind_is_refused_in_a_sentence(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json holds a value that cannot be"):
        load(tmp_path, **changes)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_model_config(tmp_path)
