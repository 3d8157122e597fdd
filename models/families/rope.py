"""Which rotary position embedding a config.json asks for. Read by the families."""

from models.config_file import ConfigFile
from models.spec import Llama3Scaling, RopeSpec
from protocol.errors import ConfigError


def read_rope(config: ConfigFile, head_dim: int) -> RopeSpec:
    """Accept "rope_parameters", of today, and "rope_theta" beside "rope_scaling", of old; the latter has the last word.

    Raise ConfigError for a kind that is not served.
    """
    rope = config.section("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{rope.place}: a rope for each kind of layer is not served")
    for place in (config, rope):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.refusal("partial_rotary_factor", "is served as 1.0 only")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "llama3":
        return RopeSpec(theta, head_dim, _read_llama3(rope))
    if kind != "default":
        raise ConfigError(f"{rope.place}: rope type {kind} is not served; served are default and llama3")
    return RopeSpec(theta, head_dim)


def _read_llama3(rope: ConfigFile) -> Llama3Scaling:
    scaling = Llama3Scaling(
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.count("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.refusal("high_freq_factor", f"must be above low_freq_factor ({scaling.low_freq_factor:g})")
    return scaling
