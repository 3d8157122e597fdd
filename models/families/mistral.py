"""Mistral 7B and what is built as it is: Llama without biases, with a sliding window in every layer."""

from models.config_file import ConfigFile
from models.families import dense, windows
from models.families.hyperparameters import read_hyperparameters
from models.spec import DecoderSpec


def read(config: ConfigFile) -> DecoderSpec:
    """The window is 4096 unless config.json names another, or null for none."""
    sizes = read_hyperparameters(config, kv_heads=8)
    attention, mlp = dense.attention(config, sizes), dense.mlp(config, sizes)
    return dense.decoder(config, sizes, attention, mlp, windows.in_all_layers(config, sizes.num_layers, if_absent=4096))
