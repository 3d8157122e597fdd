"""Token ids to text, one token at a time, without ever showing half a character.

Used by choice.py, one per choice. Special tokens have no text.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

MAX_HELD = 64
"""Bytes that never become a character are shown as U+FFFD once this many tokens have waited; a real one needs four."""

CONTEXT_TOKENS = 8
"""How much of what stands before a text tells how it begins: all that matters is whether anything does."""


class Detokenizer:
    """Wraps tokenizers' DecodeStream, adding what it lacks: a flush, and an end to waiting.

    before: the tokens that the text goes on from. Some tokenizers (those of Mistral and Llama 2) drop the space before
    a first word, but not before a later one.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int], before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._shown = self._whole(before[-CONTEXT_TOKENS:])  # the tokens behind the last piece of text
        self._held: list[int] = []  # tokens whose text is not yet complete
        self._stream = DecodeStream(ids=self._shown, skip_special_tokens=True)

    def feed(self, token_id: int) -> str:
        """Return the text that token_id completes, which may be none."""
        if token_id in self._special_ids:
            return ""
        self._held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # it refuses when a token changes how earlier ones are spelled
            return self._show_held()
        if text is None:
            return self._show_held() if len(self._held) >= MAX_HELD else ""
        self._shown, self._held = self._held, []
        return str(text)

    def flush(self) -> str:
        """Return the text of what is still held, complete or not."""
        return self._show_held() if self._held else ""

    def _whole(self, token_ids: Sequence[int]) -> list[int]:
        """Return token_ids, or nothing where they end within a character: DecodeStream would show them once more."""
        is_cut = self._tokenizer.decode(list(token_ids)).endswith("\ufffd")
        return [] if is_cut else list(token_ids)

    def _show_held(self) -> str:
        before = self._tokenizer.decode(self._shown)
        after = self._tokenizer.decode(self._shown + self._held)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._shown, self._held = self._held, []
        return str(after[len(before) :]) if after.startswith(before) else str(self._tokenizer.decode(self._shown))
