"""Qwen 2 and 2.5: biases on queries, keys and values only; upper layers may have a window."""

from models.config_file import ConfigFile
from models.families import dense, windows
from models.families.hyperparameters import read_hyperparameters
from models.spec import DecoderSpec


def read(config: ConfigFile) -> DecoderSpec:
    """The window counts only where use_sliding_window says so."""
    sizes = read_hyperparameters(config, kv_heads=32)
    attention, mlp = dense.attention(config, sizes, qkv_bias=True), dense.mlp(config, sizes)
    return dense.decoder(config, sizes, attention, mlp, windows.in_upper_layers(config, sizes.num_layers))
