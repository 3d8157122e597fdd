"""The sizes that every family's config.json gives under the same names. Read by the families; one that names them
otherwise reads its own.
"""

from typing import Final

import msgspec

from models.config_file import ConfigFile

MOST_LAYERS: Final = 4096


class Hyperparameters(msgspec.Struct, frozen=True):
    """Sizes of a dense decoder whose layers are alike."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


def read_hyperparameters(
    config: ConfigFile, kv_heads: int | None = None, head_dim: int | None = None, eps: float = 1e-6
) -> Hyperparameters:
    """Raise ConfigError for sizes that no model can have.

    kv_heads, head_dim and eps: what transformers takes for this family where config.json has no such key; None: as
    many KV heads as heads, and an even share of hidden_size for each head.
    """
    hidden_size, num_heads = config.count("hidden_size"), config.count("num_attention_heads")
    read = Hyperparameters(
        hidden_size=hidden_size,
        intermediate_size=config.count("intermediate_size"),
        num_layers=config.count("num_hidden_layers", most=MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=config.count(
            "num_key_value_heads", num_heads if "num_key_value_heads" in config else kv_heads or num_heads
        ),
        head_dim=config.count("head_dim", head_dim or hidden_size // num_heads),
        eps=config.number("rms_norm_eps", eps),
    )
    if read.num_heads % read.num_kv_heads:
        raise config.refusal("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    if read.head_dim < 2 or read.head_dim % 2:
        raise config.refusal(
            "head_dim",
            f"must be even, as hidden_size / num_attention_heads ({hidden_size} / {num_heads}) where it is left out",
        )
    return read
