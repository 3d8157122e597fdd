"""What others need to know of a model without looking into it. Read by router, command line, KV cache; never torch.

Sizes are of the whole model, before any split over ranks.
"""

from typing import Literal

import msgspec

from protocol.errors import ConfigError

ServedDtype = Literal["float32", "bfloat16", "float16"]
SERVED_DTYPES: tuple[ServedDtype, ...] = ("float32", "bfloat16", "float16")


class Split(msgspec.Struct, frozen=True):
    """A dimension that is split over ranks: number units, such as "KV heads". may_repeat: ranks may hold equal ones."""

    units: str
    number: int
    may_repeat: bool = False

    def check(self, size: int) -> None:
        """Raise ConfigError when there is no such split over size ranks."""
        if self.may_repeat:
            if self.number % size and size % self.number:
                raise ConfigError(
                    f"{self.number} {self.units} cannot be split over {size} ranks; one must divide the other"
                )
        elif self.number % size:
            raise ConfigError(f"{self.number} {self.units} cannot be split over {size} ranks; take a size that divides")


class ModelFacts(msgspec.Struct, frozen=True):
    """A model from outside. num_kv_heads and head_dim: of every layer's keys and values.

    max_context: the longest context served. num_positions: the longest that the model was made for; longer than
    max_context where layers attend through a sliding window. dtype: as config.json names it.
    """

    architecture: str
    vocab_size: int
    max_context: int
    num_positions: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    splits: tuple[Split, ...]

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ConfigError when the model cannot be split over size ranks."""
        for split in self.splits:
            split.check(size)

    def served_dtype(self, asked: Literal["auto"] | ServedDtype) -> ServedDtype:
        """Return the type to serve in. Raise ConfigError when asked leaves it to the model and it is none of ours."""
        if asked != "auto":
            return asked
        for dtype in SERVED_DTYPES:
            if dtype == self.dtype:
                return dtype
        served = ", ".join(SERVED_DTYPES)
        raise ConfigError(f"config.json: dtype {self.dtype:.80} is not served; set model.dtype to one of {served}")

    @property
    def shortened_context(self) -> str:
        """Say in one line that less context is served than the model was made for, and why; "" when it is all of it."""
        if self.max_context == self.num_positions:
            return ""
        return (
            f"context: {self.max_context:,} of the model's {self.num_positions:,} tokens, the width of its sliding "
            f"window; longer contexts are not served"
        )
