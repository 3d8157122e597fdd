"""Token ids to text, one token at a time, without ever showing half a character.

Used by choice.py, one per choice. Special tokens have no text, unless they are asked for.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

MAX_HELD = 64
"""Bytes that never become a character are shown as U+FFFD once this many tokens have waited; a real one needs four."""

CONTEXT_TOKENS = 8
"""How much of what stands before a text tells how it begins: whether anything does, and half a character."""

UNFINISHED = "\ufffd"


class Detokenizer:
    """Wraps tokenizers' DecodeStream, adding what it lacks: a flush, and an end to waiting.

    before: the tokens that the text goes on from. Some tokenizers (those of Mistral and Llama 2) drop the space before
    a first word, but not before a later one. A character that begins there and is finished here is shown here.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int] | None, before: Sequence[int] = ()) -> None:
        """special_ids: tokens that are skipped; None: all are shown."""
        self._tokenizer = tokenizer
        self._skips = special_ids is not None
        self._special_ids = special_ids or frozenset()
        self._held: list[int] = []  # tokens whose text is not yet complete
        self._not_ours = ""  # what their text begins with if the character that began before is never finished
        context = list(before[-CONTEXT_TOKENS:])
        self._shown, self._stream = self._anew(has_text_before=bool(context and self._decode(context)))
        self._take_over(self._unfinished(context))

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
        return self._ours(str(text))

    def flush(self) -> str:
        """Return the text of what is still held, complete or not."""
        return self._show_held() if self._held else ""

    def _anew(self, has_text_before: bool) -> tuple[list[int], DecodeStream]:
        """All that matters of a text before is that there is one, so any that ends with a whole character will do."""
        shown = list(self._tokenizer.encode("a", add_special_tokens=False).ids) if has_text_before else []
        return shown, DecodeStream(ids=shown, skip_special_tokens=self._skips)

    def _unfinished(self, context: list[int]) -> list[int]:
        """Return the tokens at the end of context that may begin a character: bytes of at most three."""
        for count in range(4):
            if count <= len(context) and not self._decode(context[: len(context) - count]).endswith(UNFINISHED):
                return context[len(context) - count :]
        return []

    def _take_over(self, unfinished: list[int]) -> None:
        for token_id in unfinished:
            self.feed(token_id)
        self._not_ours = self._text_of_held()

    def _show_held(self) -> str:
        text = self._text_of_held()
        self._shown, self._stream = self._anew(has_text_before=True)
        self._held = []
        return self._ours(text)

    def _text_of_held(self) -> str:
        before, after = self._decode(self._shown), self._decode(self._shown + self._held)
        return after[len(before) :] if after.startswith(before) else self._decode(self._held)

    def _ours(self, text: str) -> str:
        own, self._not_ours = text.removeprefix(self._not_ours), ""
        return own

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=self._skips))
