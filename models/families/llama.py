"""Llama 2 and 3 and what is built as they are (Yi, TinyLlama, SmolLM, ...)."""

from models.config_file import ConfigFile
from models.families import dense
from models.families.hyperparameters import read_hyperparameters
from models.spec import DecoderSpec


def read(config: ConfigFile) -> DecoderSpec:
    """Biases are for config.json to say. It may name a window, but none is used."""
    sizes, has_bias = read_hyperparameters(config), config.flag("attention_bias")
    attention = dense.attention(config, sizes, qkv_bias=has_bias, o_bias=has_bias)
    return dense.decoder(config, sizes, attention, dense.mlp(config, sizes, has_bias=config.flag("mlp_bias")))
