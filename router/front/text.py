"""Everything about the model's text: prompts to token ids, token ids to text, messages to prompts.

Loaded once from the model folder. Without a tokenizer.json, only prompts of token ids are served and all text is empty.
Used by the HTTP half of the router.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from protocol.errors import ConfigError
from router.front.chat_template import ChatTemplate, ChatTurn, load_chat_template
from router.front.detokenizer import Detokenizer
from router.front.errors import bad_request, text_too_long, too_long
from router.front.free_memory import return_free_memory
from router.front.token_pieces import Piece, TokenPieces
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

    async def encode(self, text: str, param: str) -> list[int]:
        """Return a prompt's token ids, with the special tokens that the model expects around a text."""
        return await self._encode(text, param, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[ChatTurn]) -> list[int]:
        """Return the token ids of a conversation; the template writes the special tokens itself."""
        template = self._template
        if isinstance(template, str):
            raise bad_request(f"{template}; use /v1/completions", "messages")
        try:
            text = await self._templating.run(template.render, messages)
        except ValueError as error:
            raise bad_request(str(error), "messages") from None
        return await self._encode(text, "messages", add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt given as token ids."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode(list(token_ids)))

    def piece(self, token_id: int) -> Piece:
        """Return what a token stands for by itself."""
        return Piece(f"token_id:{token_id}", None) if self._pieces is None else self._pieces.piece(token_id)

    def visible_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text: special ones nothing."""
        return b"" if token_id in self._special_ids else self.piece(token_id).data or b""

    def detokenizer(self, before: Sequence[int] = ()) -> Detokenizer | None:
        """Return a fresh one for a text that goes on from these tokens, or None when the model has no text."""
        return None if self._tokenizer is None else Detokenizer(self._tokenizer, self._special_ids, before)

    def close(self) -> None:
        """Begin no more work in threads."""
        for pool in (self._templating, self._tokenizing, self._tokenizing_long):
            pool.close()

    async def _encode(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise bad_request("this model has no tokenizer; send the prompt as token ids", param)
        if len(text) > self._max_chars:
            raise text_too_long(len(text), self._max_context, param)
        if len(text) <= MAX_CHARS_INLINE:
            return self._tokenize(text, param, add_special_tokens)
        if len(text) <= MAX_CHARS_USUAL:
            return await self._tokenizing.run(self._tokenize, text, param, add_special_tokens)
        return await self._tokenizing_long.run(self._tokenize_long, text, param, add_special_tokens)

    def _tokenize(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        """A batch of one, because encoding a batch lets other threads run meanwhile."""
        assert self._tokenizer is not None
        try:
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except (UnicodeError, TypeError) as error:
            raise bad_request(f"the text cannot be tokenized: {error}", param) from None
        if len(encoding) >= self._max_context:  # before a million numbers are made of it
            raise too_long(len(encoding), self._max_context, param)
        return list(encoding.ids)

    def _tokenize_long(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._tokenize(text, param, add_special_tokens)
        finally:
            return_free_memory()


def load_text(folder: Path, max_context: int, vocab_size: int) -> ModelText:
    """Return the text side of the model in folder. Raise ConfigError when its files are broken.

    vocab_size: how many ids the model itself has; texts with tokens beyond are refused one by one (see prompts.py).
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
