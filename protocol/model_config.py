"""What Tandem needs to know of a model, read from Hugging Face's config.json without importing torch.

Used by the engine to build the model, by the router for vocabulary and context length, and by the command line to
refuse an impossible topology before anything starts.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import ConfigError


class RopeConfig(msgspec.Struct, frozen=True):
    """Rotary embedding; the last four fields are llama3's frequency scaling, None for the plain form."""

    theta: float
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None


class ModelConfig(msgspec.Struct, frozen=True):
    """A dense decoder of one of the served families. Sizes are of the whole model, before any split over ranks."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ConfigError when the model cannot be split over size ranks."""
        if self.num_heads % size or self.intermediate_size % size:
            raise ConfigError(
                f"{self.num_heads} attention heads and intermediate size {self.intermediate_size} "
                f"cannot be split over {size} ranks; both must be divisible"
            )
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_kv_heads} KV heads cannot be split over {size} ranks; one must divide the other"
            )


# architecture -> (bias on q, k, v; bias on o; norm on each head's q and k). None: the model's "attention_bias" says.
_FAMILIES: dict[str, tuple[bool | None, bool | None, bool]] = {
    "LlamaForCausalLM": (None, None, False),
    "MistralForCausalLM": (False, False, False),
    "Qwen2ForCausalLM": (True, False, False),
    "Qwen3ForCausalLM": (None, None, True),
}


def load_model_config(folder: Path) -> ModelConfig:
    """Read folder/config.json. Raise ConfigError, naming the key, for a model that is not served."""
    raw = _read_json(folder / "config.json")
    try:
        config = _interpret(raw, _eos_token_ids(folder, raw))
        return msgspec.convert(msgspec.structs.asdict(config), ModelConfig)  # every value is of its type
    except (msgspec.ValidationError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise ConfigError(f"{folder / 'config.json'} holds a value that cannot be: {error}") from None


def _interpret(raw: dict[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    architecture = _architecture(raw)
    qkv_bias, o_bias, qk_norm = _FAMILIES[architecture]
    attention_bias = bool(raw.get("attention_bias", False))
    num_heads = _positive(raw, "num_attention_heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=_positive(raw, "hidden_size"),
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
        max_context=_max_context(raw),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if qkv_bias is None else qkv_bias,
        o_bias=attention_bias if o_bias is None else o_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=qk_norm,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        eos_token_ids=eos_token_ids,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; a model folder needs it") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object")
    return content


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures") or ["(none)"]
    if names[0] not in _FAMILIES:
        raise ConfigError(f"architecture {names[0]} is not served; served are {', '.join(sorted(_FAMILIES))}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {raw['hidden_act']} is not served; served is silu")
    if raw.get("quantization_config"):
        raise ConfigError("config.json: quantization_config: quantized weights are not served")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor {raw['partial_rotary_factor']} is not served; served is 1.0")
    return str(names[0])


def _positive(raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _max_context(raw: dict[str, Any]) -> int:
    """Within its sliding window a model attends to everything, so a window only shortens the context that we serve."""
    longest = _positive(raw, "max_position_embeddings")
    has_window = raw.get("use_sliding_window", raw.get("architectures") == ["MistralForCausalLM"])
    window = raw.get("sliding_window") if has_window else None
    return min(longest, window) if window else longest


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """Accept both spellings: "rope_parameters" (transformers 5) and "rope_theta" beside "rope_scaling"."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind != "llama3":
        raise ConfigError(f"rope type {kind} is not served; served are default and llama3")
    try:
        return RopeConfig(
            theta,
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ConfigError(f"config.json: rope type llama3 needs {error.args[0]}") from None


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json has the last word on what ends a text, config.json the first."""
    path = folder / "generation_config.json"
    generation = _read_json(path) if path.exists() else {}
    ids = generation.get("eos_token_id", raw.get("eos_token_id"))
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
