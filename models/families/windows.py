"""Which layers attend through a sliding window, and how wide it is. Read by the families."""

from models.config_file import ConfigFile
from protocol.errors import ConfigError


def in_all_layers(config: ConfigFile, num_layers: int, if_absent: int | None = None) -> list[int | None]:
    """Return the window of each layer: one for all. null in the file means none."""
    return [_width(config, if_absent)] * num_layers


def in_upper_layers(config: ConfigFile, num_layers: int) -> list[int | None]:
    """Return the window of each layer: those that layer_types names, or from max_window_layers on, if it is used."""
    if not config.flag("use_sliding_window"):
        return [None] * num_layers
    width = _width(config, if_absent=4096)
    return [width if is_sliding else None for is_sliding in _sliding_layers(config, num_layers)]


def _sliding_layers(config: ConfigFile, num_layers: int) -> list[bool]:
    kinds = config.items("layer_types")
    if not kinds:
        first = config.count("max_window_layers", 28, least=0)
        return [index >= first for index in range(num_layers)]
    if len(kinds) != num_layers or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{config.place}: layer_types must say full_attention or sliding_attention for each of {num_layers} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]


def _width(config: ConfigFile, if_absent: int | None) -> int | None:
    if "sliding_window" not in config:
        return if_absent
    return None if config.get("sliding_window") is None else config.count("sliding_window")
