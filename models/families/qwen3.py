"""Qwen 3, dense: a norm on each head's query and key, heads of a size of their own; upper layers may have a window."""

from models.config_file import ConfigFile
from models.families import dense, windows
from models.families.hyperparameters import read_hyperparameters
from models.spec import DecoderSpec


def read(config: ConfigFile) -> DecoderSpec:
    """Biases are for config.json to say; the window counts only where use_sliding_window says so."""
    sizes, has_bias = read_hyperparameters(config, kv_heads=32, head_dim=128), config.flag("attention_bias")
    attention = dense.attention(config, sizes, qkv_bias=has_bias, o_bias=has_bias, has_head_norms=True)
    mlp = dense.mlp(config, sizes)
    return dense.decoder(config, sizes, attention, mlp, windows.in_upper_layers(config, sizes.num_layers))
