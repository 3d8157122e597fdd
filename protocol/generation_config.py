"""How a model's makers would have it sampled, from its generation_config.json: what holds where a request says nothing.

Read by the router, and by the command line, which tells of it. Which tokens end a text, the model's facts say.
"""

import json
from pathlib import Path

import msgspec

from protocol.errors import ConfigError
from protocol.request import SamplingParams


class SamplingDefaults(msgspec.Struct, frozen=True):
    """By itself a model is sampled as it is; the fields mean what they mean in SamplingParams."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __str__(self) -> str:
        """Return what is not as by itself: "temperature 0.6, top_k 20"; empty when nothing is."""
        plain = SamplingDefaults()
        changed = [name for name in self.__struct_fields__ if getattr(self, name) != getattr(plain, name)]
        return ", ".join(f"{name} {getattr(self, name):g}" for name in changed)


def load_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Return what folder/generation_config.json says. Raise ConfigError for what no sampler could honour."""
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingDefaults()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        said = {name: raw[name] for name in SamplingDefaults.__struct_fields__ if raw.get(name) is not None}
        defaults = msgspec.convert({**said, "top_k": max(0, said.get("top_k", 0))}, SamplingDefaults)
        SamplingParams(max_tokens=1, seed=0, **msgspec.to_builtins(defaults)).validate(vocab_size=1)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        remedy = "mend it, or set router.sampling_defaults to none"
        raise ConfigError(f"{path} holds a value that cannot be: {error}; {remedy}") from None
    return defaults
