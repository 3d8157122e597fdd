"""Log probabilities in the two forms of OpenAI's interface. Used by completions.py and chat.py."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import NamedTuple

from protocol.messages import TokenLogprobs
from router.front.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from router.front.text import ModelText

LOWEST = -9999.0
"""JSON has no infinity; clients of this interface know this number for "impossible"."""


class Spelling(NamedTuple):
    """How a call wants its tokens written. as_ids: by their ids, so that every one can be told from all others."""

    text: ModelText
    skips_special: bool = True
    as_ids: bool = False

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.text.piece(token_id).text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt."""
        return self.text.decode(token_ids, self.skips_special)

    def visible_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text."""
        return self.text.visible_bytes(token_id, self.skips_special)


DrawnTokens = Sequence[tuple[int, TokenLogprobs]]
"""Tokens that were drawn, with their log probabilities."""


class TextOffsets:
    """Where in its choice's text each token begins, in characters. Within one there is no place but its beginning."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def next(self, data: bytes) -> int:
        """data: what the next token adds to the text."""
        offset = self._num_characters
        self._num_characters += len(self._decoder.decode(data))
        return offset


def completion_logprobs(drawn: DrawnTokens, spelling: Spelling, offsets: TextOffsets) -> CompletionLogprobs:
    """offsets: the choice's, which have come as far as these tokens. The drawn token is always among the top ones."""
    return CompletionLogprobs(
        tokens=[spelling.name(token_id) for token_id, _ in drawn],
        token_logprobs=[_finite(entry.logprob) for _, entry in drawn],
        top_logprobs=[_tops(token_id, entry, spelling) for token_id, entry in drawn],
        text_offset=[offsets.next(spelling.visible_bytes(token_id)) for token_id, _ in drawn],
    )


def chat_logprobs(drawn: DrawnTokens, spelling: Spelling) -> ChatLogprobs:
    return ChatLogprobs([_token_logprob(token_id, entry, spelling) for token_id, entry in drawn])


def _tops(token_id: int, entry: TokenLogprobs, spelling: Spelling) -> dict[str, float]:
    """Of two tokens with one spelling the less likely one goes by its id."""
    tops: dict[str, float] = {}
    logprobs = dict(zip(entry.top_token_ids, entry.top_logprobs, strict=False)) | {token_id: entry.logprob}
    for top_id, logprob in sorted(logprobs.items(), key=lambda top: -top[1]):
        spelled = spelling.name(top_id)
        tops[f"token_id:{top_id}" if spelled in tops else spelled] = _finite(logprob)
    return tops


def _token_logprob(token_id: int, entry: TokenLogprobs, spelling: Spelling) -> TokenLogprob:
    tops = [
        TopLogprob(*_spelled(top_id, logprob, spelling))
        for top_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=False)
    ]
    return TokenLogprob(*_spelled(token_id, entry.logprob, spelling), tops)


def _spelled(token_id: int, logprob: float, spelling: Spelling) -> tuple[str, float, list[int] | None]:
    data = spelling.text.piece(token_id).data
    return spelling.name(token_id), _finite(logprob), None if data is None else list(data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
