"""A first step on weights that were just loaded: are its results numbers, and how long will steps take here?

Called once by a worker before it says that it is ready, on every rank of a group at once. Knows no requests.
"""

import statistics
import time
from itertools import pairwise

import torch
from msgspec.structs import replace

from engine.engine import Engine
from engine.host_copy import HostCopy
from engine.limits import Limits
from engine.warm_up import prompt_batch
from protocol.errors import ConfigError

_FEW_TOKENS = 16
"""On a CPU, where a whole batch could take minutes. A token of few costs more than one of many, never less."""


def try_out(engine: Engine, limits: Limits, block_size: int) -> float:
    """Return for how long a step of the largest batch may show no progress, in seconds: a layer, on a GPU all of them.

    Raise ConfigError when the model's output is not finite.
    """
    num_tokens = limits.batch_tokens if engine.is_asynchronous else min(_FEW_TOKENS, limits.batch_tokens)
    batch = prompt_batch(num_tokens, limits.max_context, block_size, engine.kv_cache.scratch_block)
    ids = torch.linspace(0, engine.vocab_size - 1, num_tokens, dtype=torch.float64).long().tolist()
    batch = replace(batch, token_ids=tuple(ids))
    _wait(engine.forward(batch), engine)  # the first one takes memory, and wakes threads
    times_s = [time.monotonic()]
    logits = engine.forward(batch, None, lambda num_layers: times_s.append(time.monotonic()))
    _wait(logits, engine)
    if logits is not None:
        _check(logits)
    if engine.is_asynchronous:
        return time.monotonic() - times_s[0]
    gaps_s = [later - sooner for sooner, later in pairwise(times_s)]
    return statistics.median(gaps_s) * limits.batch_tokens / num_tokens


def _wait(logits: torch.Tensor | None, engine: Engine) -> None:
    """Let the device finish, on ranks without logits too."""
    HostCopy(torch.zeros(1, device=engine.device) if logits is None else logits[:1, :1]).wait()


def _check(logits: torch.Tensor) -> None:
    """What is wrong with any rank's weights shows in rank 0's logits; all ranks have done their part by now."""
    if not torch.isfinite(logits).all():
        raise ConfigError(
            "the model's output is not finite: a weight is NaN or infinite, or model.dtype is too narrow for this "
            "model (float16 for one that was trained in bfloat16); look for such values in its *.safetensors, or try "
            "another model.dtype"
        )
