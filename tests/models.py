"""Tiny random models of every served family, and what transformers makes of them; the ground truth of many tests.

Weights are large enough that the two best logits lie more than float32 noise apart, so greedy tokens can be compared
one by one. Biases and norm weights are random too: left at their usual zeros and ones they would hide mistakes.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.facts import ModelFacts
from protocol.layout import KVLayout, keys_and_values

FAMILIES = ("llama", "llama3_rope", "mistral", "qwen2", "qwen3", "phi3")

_SIZES: dict[str, Any] = {
    "vocab_size": 515,  # odd, so that no tensor-parallel size splits it evenly
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3_rope": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 48},
    "phi3": {"model_type": "phi3"},
}


def make_model(family: str, folder: Path, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """Write config.json and float32 safetensors of a random model into folder and return folder.

    overrides are keys of config.json, for instance num_hidden_layers=1 or eos_token_id=7. No token ends a text unless
    eos_token_id says so. Context 1024, 4 heads over 2 KV heads: every tensor-parallel size of 1, 2 and 4 works.
    """
    keys = _SIZES | _FAMILY_KEYS[family] | overrides
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _random_model(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def _random_model(config: PretrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def reference_model(folder: Path) -> PreTrainedModel:
    """Return the model in folder as transformers builds it, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def reference_tokens(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the num_tokens greedy tokens that transformers generates after prompt (fewer when one ends the text)."""
    prompt_ids = torch.tensor([prompt])
    generated = reference_model(folder).generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=num_tokens, do_sample=False
    )
    return [int(token_id) for token_id in generated[0, len(prompt) :]]


@torch.inference_mode()
def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Return transformers' float32 logits after every token: [num_tokens, vocab_size]."""
    logits: torch.Tensor = reference_model(folder)(torch.tensor([token_ids])).logits[0]
    return logits


def layout_of(facts: ModelFacts, block_size: int, tensor_parallel: int = 1, dtype: str = "float32") -> KVLayout:
    """Return how a group keeps this model's KV."""
    planes = keys_and_values(facts.num_kv_heads, facts.head_dim, dtype)
    return KVLayout("model", facts.num_layers, planes, block_size, tensor_parallel)
