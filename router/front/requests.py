"""What a body asks for, as requests to the cluster: prompts of token ids, parameters, and room for what follows.

Used by completions.py, chat.py and call.py. What needs no model is checked in schemas.py.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from protocol.generation_config import SamplingDefaults
from protocol.request import Request, SamplingParams
from router.control.dispatch import Dispatcher, NoPair, PromptTooLong
from router.front.errors import ApiError, bad_request, too_long, unavailable
from router.front.schemas import MAX_PROMPTS, ChatBody, ChatMessage, CompletionBody, SamplingBody
from router.front.text import ModelText

T = TypeVar("T")

_DEFAULTS = SamplingParams(max_tokens=1, seed=0)


class Prompt(msgspec.Struct, frozen=True):
    """One prompt. text: None when it was given as ids, or cut. begins_text: what follows is a text of its own.

    param: which parameter it was.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    begins_text: bool = False
    param: str = "prompt"


@dataclass(frozen=True)
class RequestMaker:
    """Makes the requests of one model. All its methods raise ApiError 400 for what cannot be served."""

    text: ModelText
    dispatcher: Dispatcher
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    sampling_defaults: SamplingDefaults

    async def completion_prompts(self, body: CompletionBody) -> list[Prompt]:
        """Return the prompts of a completion, 1 to 16."""
        given = body.prompt
        if not given:
            raise bad_request("prompt must not be empty", "prompt")
        several = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        if len(several) > MAX_PROMPTS:
            raise bad_request(f"at most {MAX_PROMPTS} prompts can be sent at once, not {len(several)}", "prompt")
        if isinstance(given, list) and len({type(item) for item in given}) > 1:
            message = "prompt must be one text, one list of token ids, or a list of one of these kinds"
            raise bad_request(message, "prompt")
        return [await self._of_item(item, body) for item in several]

    async def chat_prompt(self, body: ChatBody) -> Prompt:
        """Return the prompt that the model's chat template makes of the messages."""
        is_continued = bool(body.continue_final_message)
        if is_continued and body.add_generation_prompt:
            message = "a message is continued, or a new one begun: set continue_final_message or add_generation_prompt"
            raise bad_request(message, "add_generation_prompt")
        messages, variables = [_for_template(message) for message in body.messages], _variables(body)
        if is_continued:
            text = await self.text.render_unfinished(messages, variables)
        else:
            text = await self.text.render(messages, variables, body.add_generation_prompt is not False)
        token_ids = await self._encode(text, body, "messages", bool(body.add_special_tokens))
        kept = self._checked(token_ids, body, "messages")
        return Prompt(kept, begins_text=not is_continued, param="messages")

    def request(self, request_id: str, prompt: Prompt, body: SamplingBody) -> Request:
        """Return the request for what is to follow prompt. Raise ApiError 503 as well, when nobody can take it.

        What was asked for is checked before it is cut to what fits; by itself it is the rest of the context.
        """
        room = self.room_for(prompt)
        asked = room if body.most_tokens is None else body.most_tokens
        params = sampling_params(
            body, asked, body.num_logprobs, self.eos_token_ids, self.vocab_size, self.sampling_defaults
        )
        cut = msgspec.structs.replace(params, max_tokens=min(asked, room), min_tokens=min(params.min_tokens, room))
        return Request(request_id, prompt.token_ids, cut, body.cache_salt or "")

    def room_for(self, prompt: Prompt) -> int:
        """Return how many tokens may follow prompt: at least one. Raise ApiError 400 or 503."""
        num_prompt_tokens = len(prompt.token_ids)
        if num_prompt_tokens + 1 > self.max_context:
            raise too_long(num_prompt_tokens, self.max_context, prompt.param)
        try:
            capacity = self.dispatcher.capacity(num_prompt_tokens)
        except NoPair as error:
            raise unavailable(str(error)) from None
        except PromptTooLong as error:
            raise too_long(num_prompt_tokens, error.num_tokens, prompt.param) from None
        return min(self.max_context, capacity) - num_prompt_tokens

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _of_item(self, given: object, body: CompletionBody) -> Prompt:
        if isinstance(given, str):
            token_ids = await self._encode(given, body, "prompt", body.add_special_tokens is not False) if given else []
            kept = self._checked(token_ids, body, "prompt")
            return Prompt(kept, given if len(kept) == len(token_ids) else None)
        return Prompt(self._checked(given if isinstance(given, list) else [], body, "prompt"))

    async def _encode(self, text: str, body: SamplingBody, param: str, add_special_tokens: bool) -> list[int]:
        is_cut = body.truncate_prompt_tokens is not None
        return await self.text.encode(text, param, add_special_tokens, may_be_long=is_cut)

    def _checked(self, token_ids: Sequence[int], body: SamplingBody, param: str) -> tuple[int, ...]:
        """The one gate to the model: a tokenizer, too, may know ids for which the model has no embedding."""
        if not token_ids:
            raise bad_request(f"{param} must not be empty", param)
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            outside = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            known = f"the vocabulary has ids 0 to {self.vocab_size - 1}"
            raise bad_request(f"{param} holds token id {outside}; {known}", param)
        return tuple(self._truncated(token_ids, body))

    def _truncated(self, token_ids: Sequence[int], body: SamplingBody) -> Sequence[int]:
        """-1 leaves as much as the context has room for, beside the answer."""
        most = body.truncate_prompt_tokens
        if most == 0:
            raise bad_request("truncate_prompt_tokens must be -1, or 1 at least", "truncate_prompt_tokens")
        if most == -1:
            most = max(1, self.max_context - (body.most_tokens or 1))
        if most is None or len(token_ids) <= most:
            return token_ids
        return token_ids[:most] if body.truncation_side == "right" else token_ids[-most:]


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


def _for_template(message: ChatMessage) -> dict[str, str]:
    """Templates expect one text of every turn, and print None when they are given it."""
    parts = message.content or ""
    content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    more = {"name": message.name, "reasoning_content": message.reasoning_content or message.reasoning}
    return {"role": message.role, "content": content} | {name: text for name, text in more.items() if text is not None}


def _variables(body: ChatBody) -> Mapping[str, Any]:
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return effort | (body.chat_template_kwargs or {})


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
