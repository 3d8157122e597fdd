"""Everything about the model's text: prompts to token ids, token ids to text, messages to prompts.

Loaded once from the model folder. Without a tokenizer.json, only prompts of token ids are served and all text is empty.
Used by the HTTP half of the router.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from protocol.errors import ConfigError
from router.front.chat_template import ChatTemplate, ChatTurn, load_chat_template
from router.front.detokenizer import UNFINISHED, Detokenizer
from router.front.errors import bad_request, text_too_long, too_long
from router.front.free_memory import return_free_memory
from router.front.token_pieces import TokenPiece, TokenPieces
from router.front.work_pool import WorkPool

MAX_CHARS_INLINE = 2000
"""Longer texts are tokenized in a thread: at about 1 us a character, this one delays the others' tokens by 2 ms."""
MAX_CHARS_USUAL = 100_000
"""Longer ones still, of seconds each, wait for one another and for nobody else."""

NO_TEMPLATE = "this model has no chat template"

logger = logging.getLogger(__name__)


class ModelText:
    """A model's tokenizer and chat template, where it has them."""

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | str, max_context: int) -> None:
        """template: a text says why there is none."""
        self._tokenizer = tokenizer
        self._template = template
        self._max_context = max_context
        self._special_ids: frozenset[int] = frozenset()
        self._max_chars = 0
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
            self._max_chars = max_context * max(map(len, tokenizer.get_vocab()), default=1)
        self._templating = WorkPool("chat templates", num_threads=2, max_waiting=1024)
        self._tokenizing = WorkPool("tokenizing", num_threads=2, max_waiting=1024)
        self._tokenizing_long = WorkPool("tokenizing of long texts", num_threads=1, max_waiting=32)
        self._pieces = None if tokenizer is None else TokenPieces(tokenizer)

    async def render(self, messages: Sequence[ChatTurn], variables: Mapping[str, Any], has_opening: bool = True) -> str:
        """Return the text of a conversation; the template writes the special tokens itself. See ChatTemplate.render."""
        return await self._templated(self._chat(variables).render, messages, variables, has_opening)

    async def render_unfinished(self, messages: Sequence[ChatTurn], variables: Mapping[str, Any]) -> str:
        """Return the text of a conversation up to the end of its last message."""
        return await self._templated(self._chat(variables).render_unfinished, messages, variables)

    def _chat(self, variables: Mapping[str, Any]) -> ChatTemplate:
        template = self._template
        if isinstance(template, str):
            raise bad_request(f"{template}; use /v1/completions", "messages")
        unknown = next((name for name in sorted(variables) if name not in template.variables), None)
        if unknown is not None:
            known = ", ".join(sorted(template.variables)) or "none"
            where = "reasoning_effort" if unknown == "reasoning_effort" else "chat_template_kwargs"
            raise bad_request(f"{where}: the model's chat template has no {unknown[:64]}; it has {known}", where)
        return template

    async def _templated(self, render: Callable[..., str], *arguments: object) -> str:
        try:
            return await self._templating.run(render, *arguments)
        except ValueError as error:
            raise bad_request(str(error), "messages") from None

    def decode(self, token_ids: Sequence[int], skips_special: bool) -> str:
        """Return the text of a prompt without half a character at its end, which is shown when it is finished."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skips_special)).rstrip(UNFINISHED)

    def piece(self, token_id: int) -> TokenPiece:
        """Return what a token stands for by itself."""
        return TokenPiece(f"token_id:{token_id}", None) if self._pieces is None else self._pieces.piece(token_id)

    def visible_bytes(self, token_id: int, skips_special: bool) -> bytes:
        """Return what a token adds to a text: special ones nothing when those are skipped."""
        is_skipped = skips_special and token_id in self._special_ids
        return b"" if is_skipped else self.piece(token_id).data or b""

    def detokenizer(self, before: Sequence[int], skips_special: bool) -> Detokenizer | None:
        """Return a fresh one for a text that goes on from these tokens, or None when the model has no text."""
        if self._tokenizer is None:
            return None
        return Detokenizer(self._tokenizer, self._special_ids if skips_special else None, before)

    def close(self) -> None:
        """Begin no more work in threads."""
        for pool in (self._templating, self._tokenizing, self._tokenizing_long):
            pool.close()

    async def encode(
        self, text: str, param: str, add_special_tokens: bool = True, may_be_long: bool = False
    ) -> list[int]:
        """Return a text's token ids. add_special_tokens: with those that the model expects around a text.

        Raise ApiError 400 for what cannot be tokenized or, unless it may_be_long, does not fit into the context.
        """
        if self._tokenizer is None:
            raise bad_request("this model has no tokenizer; send the prompt as token ids", param)
        if len(text) > self._max_chars:
            raise text_too_long(len(text), self._max_context, param)
        if len(text) <= MAX_CHARS_INLINE:
            return self._tokenize(text, param, add_special_tokens, may_be_long)
        if len(text) <= MAX_CHARS_USUAL:
            return await self._tokenizing.run(self._tokenize, text, param, add_special_tokens, may_be_long)
        return await self._tokenizing_long.run(self._tokenize_long, text, param, add_special_tokens, may_be_long)

    def _tokenize(self, text: str, param: str, add_special_tokens: bool, may_be_long: bool) -> list[int]:
        """A batch of one, because encoding a batch lets other threads run meanwhile."""
        assert self._tokenizer is not None
        try:
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except (UnicodeError, TypeError) as error:
            raise bad_request(f"the text cannot be tokenized: {error}", param) from None
        if len(encoding) >= self._max_context and not may_be_long:  # before a million numbers are made of it
            raise too_long(len(encoding), self._max_context, param)
        return list(encoding.ids)

    def _tokenize_long(self, text: str, param: str, add_special_tokens: bool, may_be_long: bool) -> list[int]:
        try:
            return self._tokenize(text, param, add_special_tokens, may_be_long)
        finally:
            return_free_memory()


def load_text(folder: Path, max_context: int, vocab_size: int) -> ModelText:
    """Return the text side of the model in folder. Raise ConfigError when its files are broken.

    vocab_size: how many ids the model itself has; texts with tokens beyond are refused one by one (see requests.py).
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return ModelText(None, NO_TEMPLATE, max_context)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise ConfigError(f"{path} is not a tokenizer: {error}") from None
    _warn_of_strangers(tokenizer, path, vocab_size)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return ModelText(tokenizer, _template(folder), max_context)


def _template(folder: Path) -> ChatTemplate | str:
    """A broken one costs chat, and nothing else."""
    try:
        return load_chat_template(folder) or NO_TEMPLATE
    except ConfigError as error:
        logger.warning("%s; chat is not served", error)
        return str(error)


def _warn_of_strangers(tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
    """Fine-tunes often add a token to the tokenizer alone."""
    beyond = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    if beyond:
        first = min(beyond)
        logger.warning(
            "%s knows %d tokens beyond the model's %d, from id %d (%r) on; texts that contain them are refused",
            *(path, len(beyond), vocab_size, first, beyond[first]),
        )
