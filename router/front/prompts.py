"""The prompts of a body as token ids within the vocabulary. Used by completions.py and chat.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from router.front.errors import bad_request
from router.front.schemas import MAX_PROMPTS, ChatBody, ChatMessage, CompletionBody, SamplingBody
from router.front.text import ModelText


class Prompt(msgspec.Struct, frozen=True):
    """One prompt. text: None when it was given as ids, or cut. begins_text: what follows is a text of its own."""

    token_ids: tuple[int, ...]
    text: str | None = None
    begins_text: bool = False


@dataclass(frozen=True)
class PromptMaker:
    """Makes the prompts of one model. All its methods raise ApiError 400 for what cannot be served."""

    text: ModelText
    vocab_size: int
    max_context: int

    async def of_completion(self, body: CompletionBody) -> list[Prompt]:
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

    async def of_chat(self, body: ChatBody) -> Prompt:
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
        return Prompt(self._checked(token_ids, body, "messages"), begins_text=not is_continued)

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


def _for_template(message: ChatMessage) -> dict[str, str]:
    """Templates expect one text of every turn, and print None when they are given it."""
    parts = message.content or ""
    content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    more = {"name": message.name, "reasoning_content": message.reasoning_content or message.reasoning}
    return {"role": message.role, "content": content} | {name: text for name, text in more.items() if text is not None}


def _variables(body: ChatBody) -> Mapping[str, Any]:
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return effort | (body.chat_template_kwargs or {})
