"""HTTP parameters to SamplingParams: defaults, and every check that needs the vocabulary.

Used by completions.py and chat.py.
"""

import re
import secrets
from collections.abc import Sequence
from typing import TypeVar

from protocol.generation_config import SamplingDefaults
from protocol.request import SamplingParams
from router.front.errors import ApiError, bad_request
from router.front.schemas import SamplingBody

T = TypeVar("T")

_DEFAULTS = SamplingParams(max_tokens=1, seed=0)


def sampling_params(
    body: SamplingBody,
    max_tokens: int,
    num_logprobs: int | None,
    eos_token_ids: tuple[int, ...],
    vocab_size: int,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """Return the parameters that body asks for, or raise ApiError 400 naming the one that cannot be honoured.

    defaults: what holds where body says nothing.
    """
    params = SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        temperature=_or(body.temperature, defaults.temperature),
        top_k=0 if body.top_k == -1 else _or(body.top_k, defaults.top_k),
        top_p=_or(body.top_p, defaults.top_p),
        min_p=_or(body.min_p, defaults.min_p),
        presence_penalty=_or(body.presence_penalty, _DEFAULTS.presence_penalty),
        frequency_penalty=_or(body.frequency_penalty, _DEFAULTS.frequency_penalty),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(body),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        eos_token_ids=eos_token_ids,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=_or(body.min_tokens, _DEFAULTS.min_tokens),
        num_logprobs=num_logprobs,
    )
    try:
        params.validate(vocab_size)
    except ValueError as error:
        raise _named(error) from None
    return params


def stop_strings(body: SamplingBody) -> Sequence[str]:
    """Return the stop strings as a list."""
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _logit_bias(body: SamplingBody) -> dict[int, float]:
    biases = body.logit_bias or {}
    wrong = next((key for key in biases if not re.fullmatch(r"[0-9]{1,10}", key)), None)
    if wrong is not None:
        raise bad_request(f"logit_bias keys must be token ids written as strings, not {wrong[:32]!r}", "logit_bias")
    return {int(key): bias for key, bias in biases.items()}


def _named(error: ValueError) -> ApiError:
    """validate begins its messages with the parameter's name."""
    name = re.match(r"\w+", str(error))
    return bad_request(str(error), name.group() if name else None)
