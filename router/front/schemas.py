"""HTTP bodies of requests as checked types: what is accepted, with bounds.

msgspec decodes bodies straight into these; /openapi.json is generated from them. What is known elsewhere and not served
here is refused by unserved.py. What needs the model (vocabulary, context) is checked in requests.py.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from protocol.errors import UNPARSABLE
from router.front.errors import ApiError, bad_request
from router.front.unserved import refuse_in_message, refuse_unserved

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 1024
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 1024

Int = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_CHARS)]
StopList = Annotated[list[StopString], msgspec.Meta(max_length=MAX_STOPS)]


class StreamOptions(msgspec.Struct, frozen=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of completion share. null means the default, as in OpenAI's interface."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    n: Int | None = None
    stop: StopString | StopList | None = None
    seed: Int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], msgspec.Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    stop_token_ids: Annotated[list[Int], msgspec.Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None  # SGLang's name for the same
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 31) - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens were asked for at most."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to each token are wanted; None: no log probabilities at all."""
        return None

    @property
    def stops(self) -> Sequence[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def shows_stop(self) -> bool:
        """Whether what ends the text is part of it."""
        return bool(self.include_stop_str_in_output or self.no_stop_trim)


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/completions. prompt is one text, one list of token ids, or a list of either."""

    prompt: str | list[str | Int | list[Int]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    echo: bool | None = None

    @property
    def most_tokens(self) -> int:
        return self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn; only an assistant may have said nothing. name and reasoning_content are for templates that use them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # known, and refused unless their value asks for nothing (see unserved.py)
    audio: Any = None
    function_call: Any = None
    refusal: Any = None
    tool_call_id: Any = None
    tool_calls: Any = None


class ChatBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


BodyT = TypeVar("BodyT", bound=SamplingBody)


def parse_body(data: bytes | bytearray, body_type: type[BodyT]) -> BodyT:
    """Return data as body_type, or raise ApiError 400 that names the parameter at fault."""
    try:
        body = msgspec.json.decode(data, type=body_type)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except UNPARSABLE as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    refuse_unserved(data, frozenset(body_type.__struct_fields__))
    _check_together(body)
    return body


def _invalid(message: str) -> ApiError:
    """msgspec ends its messages with the place: "... - at `$.messages[0].role`"."""
    what, _, where = message.partition(" - at `$")
    path = where.rstrip("`").removeprefix(".")
    missing = re.search(r"missing required field `(\w+)`", what)
    param = path.partition(".")[0].partition("[")[0] or (missing.group(1) if missing else None)
    return bad_request(f"{path}: {what}" if path else what, param)


def _check_together(body: SamplingBody) -> None:
    """What no field can say of itself."""
    if body.n not in (None, 1):
        raise bad_request(f"n must be 1, not {body.n}: more than one choice per prompt is not served", "n")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    if body.truncation_side is not None and body.truncate_prompt_tokens is None:
        raise bad_request("truncation_side needs truncate_prompt_tokens", "truncation_side")
    for message in getattr(body, "messages", ()):
        _check_message(message)


def _check_message(message: ChatMessage) -> None:
    refuse_in_message(message)
    if message.content is None and message.role != "assistant":
        raise bad_request(f"a message of role {message.role} must have content", "messages")
