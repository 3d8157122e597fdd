"""A random Llama of about 100 million parameters, for measuring speed where no weights can be fetched.

Its sizes are those of docs/performance.md's CPU table. Weights are drawn wide enough that greedy tokens are not decided
by rounding, so that the systems measured can be held to the same answers first.
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def ensure_random_llama(folder: Path) -> Path:
    """Write the model into folder unless it is there already, and return folder."""
    if (folder / "model.safetensors").exists():
        return folder
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder
