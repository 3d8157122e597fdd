"""HTTP bodies of requests as checked types: what is accepted, with bounds, and what is known but not served.

msgspec decodes bodies straight into these; /openapi.json is generated from them. Fields not listed are ignored.
What needs the model (vocabulary, context) is checked in sampling.py and prompts.py.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from protocol.errors import UNPARSABLE
from router.front.errors import ApiError, bad_request

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
    user: str | None = None
    # known, and refused unless their value asks for nothing (see _HARMLESS)
    allowed_token_ids: Any = None
    bad_words: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    include_stop_str_in_output: Any = None
    length_penalty: Any = None
    logits_processors: Any = None
    prompt_logprobs: Any = None
    response_format: Any = None
    skip_special_tokens: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None


class CompletionBody(SamplingBody, frozen=True, kw_only=True):
    """POST /v1/completions. prompt is one text, one list of token ids, or a list of either."""

    prompt: str | list[str | Int | list[Int]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    # known, and refused unless their value asks for nothing
    best_of: Any = None
    prompt_embeds: Any = None
    suffix: Any = None


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn; only an assistant may have said nothing. name and reasoning_content are for templates that use them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    # known, and refused unless their value asks for nothing: this server knows no tools and writes no speech
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
    # known, and refused unless their value asks for nothing
    add_generation_prompt: Any = None
    audio: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: Any = None
    documents: Any = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    tool_choice: Any = None
    tools: Any = None


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "refusal": ("",),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_call_id": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Values besides null that ask for nothing of a parameter that is known but not served."""

BodyT = TypeVar("BodyT", bound=SamplingBody)


def parse_body(data: bytes | bytearray, body_type: type[BodyT]) -> BodyT:
    """Return data as body_type, or raise ApiError 400 that names the parameter at fault."""
    try:
        body = msgspec.json.decode(data, type=body_type)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except UNPARSABLE as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    _refuse_unsupported(body)
    return body


def _invalid(message: str) -> ApiError:
    """msgspec ends its messages with the place: "... - at `$.messages[0].role`"."""
    what, _, where = message.partition(" - at `$")
    path = where.rstrip("`").removeprefix(".")
    missing = re.search(r"missing required field `(\w+)`", what)
    param = path.partition(".")[0].partition("[")[0] or (missing.group(1) if missing else None)
    return bad_request(f"{path}: {what}" if path else what, param)


def _refuse_unsupported(body: SamplingBody) -> None:
    if body.n not in (None, 1):
        raise bad_request(f"n must be 1, not {body.n}: more than one choice per prompt is not served", "n")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    own_echo = isinstance(body, CompletionBody)
    refuse_values(body, skip=("echo",) if own_echo else ())
    for message in getattr(body, "messages", ()):
        _check_message(message)


def _check_message(message: ChatMessage) -> None:
    refuse_values(message, prefix="messages.")
    if message.content is None and message.role != "assistant":
        raise bad_request(f"a message of role {message.role} must have content", "messages")


def refuse_values(fields: msgspec.Struct, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """Raise ApiError 400 for a known parameter whose value asks for something that is not served."""
    for name in fields.__struct_fields__:
        value = getattr(fields, name)
        if value is None or name not in _HARMLESS or name in skip:
            continue
        if not any(value == harmless and type(value) is type(harmless) for harmless in _HARMLESS[name]):
            raise bad_request(f"{prefix}{name} is not served with this value; leave it out", f"{prefix}{name}")
