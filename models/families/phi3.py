"""Phi-3 and Phi-4 up to their short context: no biases; q, k and v are one matrix in the file, gate and up another."""

from models.config_file import ConfigFile
from models.families import dense, windows
from models.families.hyperparameters import read_hyperparameters
from models.spec import DecoderSpec


def read(config: ConfigFile) -> DecoderSpec:
    """Long contexts need the rope type longrope, which is refused with every other one that is not served."""
    sizes = read_hyperparameters(config, eps=1e-5)
    attention = dense.attention(config, sizes, dense.FUSED_QKV)
    mlp = dense.mlp(config, sizes, dense.FUSED_GATE_UP)
    return dense.decoder(config, sizes, attention, mlp, windows.in_all_layers(config, sizes.num_layers))
