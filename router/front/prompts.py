"""The prompts of a body as token ids within the vocabulary. Used by completions.py and chat.py."""

from collections.abc import Sequence

import msgspec

from router.front.errors import bad_request
from router.front.schemas import MAX_PROMPTS, ChatBody, ChatMessage, CompletionBody
from router.front.text import ModelText


class Prompt(msgspec.Struct, frozen=True):
    """One prompt; text is None when it was given as token ids. is_chat: what follows is a text of its own."""

    token_ids: tuple[int, ...]
    text: str | None = None
    is_chat: bool = False


async def completion_prompts(body: CompletionBody, text: ModelText, vocab_size: int) -> list[Prompt]:
    """Return the prompts of a completion, 1 to 16. Raise ApiError 400 for any that cannot be served."""
    given = body.prompt
    if not given:
        raise bad_request("prompt must not be empty", "prompt")
    several = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if len(several) > MAX_PROMPTS:
        raise bad_request(f"at most {MAX_PROMPTS} prompts can be sent at once, not {len(several)}", "prompt")
    if isinstance(given, list) and len({type(item) for item in given}) > 1:
        raise bad_request("prompt must be one text, one list of token ids, or a list of one of these kinds", "prompt")
    return [await _prompt(item, text, vocab_size) for item in several]


async def chat_prompt(body: ChatBody, text: ModelText, vocab_size: int) -> Prompt:
    """Return the prompt that the model's chat template makes of the messages."""
    messages = [_for_template(message) for message in body.messages]
    return Prompt(_checked(await text.encode_chat(messages), vocab_size, "messages"), is_chat=True)


def _for_template(message: ChatMessage) -> dict[str, str]:
    """Templates expect one text of every turn, and print None when they are given it."""
    parts = message.content or ""
    content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    more = {"name": message.name, "reasoning_content": message.reasoning_content}
    return {"role": message.role, "content": content} | {name: text for name, text in more.items() if text is not None}


async def _prompt(given: object, text: ModelText, vocab_size: int) -> Prompt:
    if isinstance(given, str):
        token_ids = await text.encode(given, "prompt") if given else []
        return Prompt(_checked(token_ids, vocab_size, "prompt"), given)
    return Prompt(_checked(given if isinstance(given, list) else [], vocab_size, "prompt"))


def _checked(token_ids: Sequence[int], vocab_size: int, param: str) -> tuple[int, ...]:
    """The one gate to the model: a tokenizer, too, may know ids for which the model has no embedding."""
    if not token_ids:
        raise bad_request(f"{param} must not be empty", param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        outside = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise bad_request(f"{param} holds token id {outside}; the vocabulary has ids 0 to {vocab_size - 1}", param)
    return tuple(token_ids)
