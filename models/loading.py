"""From a model's folder to its description: which family, what it is made of, what others need to know of it.

Called by the engine's builder, the router and the command line; reads JSON files only, never torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.config_file import ConfigFile, read_config_file
from models.facts import ModelFacts
from models.families import llama, mistral, phi3, qwen2, qwen3
from models.spec import DecoderSpec, ModelSpec
from protocol.errors import ConfigError

FAMILIES: dict[str, Callable[[ConfigFile], DecoderSpec]] = {
    "LlamaForCausalLM": llama.read,
    "MistralForCausalLM": mistral.read,
    "Phi3ForCausalLM": phi3.read,
    "Qwen2ForCausalLM": qwen2.read,
    "Qwen3ForCausalLM": qwen3.read,
}
"""By the first of config.json's architectures."""


def load_model(folder: Path) -> ModelSpec:
    """Read config.json and generation_config.json. Raise ConfigError, naming file and key, for what is not served."""
    config = read_config_file(folder / "config.json")
    generation = folder / "generation_config.json"
    return describe(config, read_config_file(generation) if generation.exists() else None)


def load_facts(folder: Path) -> ModelFacts:
    """Return what load_model says of the model from outside."""
    return load_model(folder).facts


def describe(config: ConfigFile, generation: ConfigFile | None = None) -> ModelSpec:
    """Return the model that a config.json speaks of. Raise ConfigError for what is not served."""
    architecture = _architecture(config)
    if config.get("quantization_config"):
        raise ConfigError(f"{config.place}: quantization_config: quantized weights are not served")
    decoder = FAMILIES[architecture](config)
    return ModelSpec(_facts(architecture, config, generation, decoder), decoder)


def _architecture(config: ConfigFile) -> str:
    names = config.items("architectures") or ["(none)"]
    if not isinstance(names[0], str) or names[0] not in FAMILIES:
        raise ConfigError(
            f"{config.place}: architecture {names[0]!s:.80} is not served; served are {', '.join(sorted(FAMILIES))}"
        )
    return names[0]


def _facts(architecture: str, config: ConfigFile, generation: ConfigFile | None, decoder: DecoderSpec) -> ModelFacts:
    """Within its sliding window a model attends to everything, so a window only shortens the context that is served."""
    num_positions = config.count("max_position_embeddings")
    attentions = [layer.attention for layer in decoder.layers]
    splits = {split: None for layer in decoder.layers for split in layer.splits()}
    return ModelFacts(
        architecture=architecture,
        vocab_size=decoder.vocabulary.size,
        max_context=min(num_positions, *(attention.window or num_positions for attention in attentions)),
        num_positions=num_positions,
        eos_token_ids=_eos_token_ids(config, generation),
        dtype=config.text("dtype", config.text("torch_dtype", "float32")).removeprefix("torch."),
        num_layers=len(decoder.layers),
        num_kv_heads=attentions[0].kv_heads.number,
        head_dim=attentions[0].head_dim,
        splits=tuple(splits),
    )


def _eos_token_ids(config: ConfigFile, generation: ConfigFile | None) -> tuple[int, ...]:
    """generation_config.json has the last word on what ends a text, config.json the first."""
    source = generation if generation is not None and "eos_token_id" in generation else config
    value = source.get("eos_token_id")
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in ids):
        raise source.refusal("eos_token_id", "must be a token id or a list of them")
    return tuple(ids)
