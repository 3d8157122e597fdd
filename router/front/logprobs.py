"""Log probabilities in the two forms of OpenAI's interface. Used by completions.py and chat.py."""

from codecs import getincrementaldecoder
from collections.abc import Sequence

from protocol.messages import TokenLogprobs
from router.front.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from router.front.text import ModelText
from router.front.token_pieces import Piece

LOWEST = -9999.0
"""JSON has no infinity; clients of this interface know this number for "impossible"."""

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


def completion_logprobs(drawn: Drawn, text: ModelText, offsets: TextOffsets) -> CompletionLogprobs:
    """offsets: the choice's, which have come as far as these tokens. The drawn token is always among the top ones."""
    return CompletionLogprobs(
        tokens=[text.piece(token_id).text for token_id, _ in drawn],
        token_logprobs=[_finite(entry.logprob) for _, entry in drawn],
        top_logprobs=[_tops(token_id, entry, text) for token_id, entry in drawn],
        text_offset=[offsets.next(text.visible_bytes(token_id)) for token_id, _ in drawn],
    )


def chat_logprobs(drawn: DrawnTokens, text: ModelText) -> ChatLogprobs:
    return ChatLogprobs([_token_logprob(token_id, entry, text) for token_id, entry in drawn])


def _tops(token_id: int, entry: TokenLogprobs, text: ModelText) -> dict[str, float]:
    """Of two tokens with one spelling the less likely one goes by its id."""
    tops: dict[str, float] = {}
    logprobs = dict(zip(entry.top_token_ids, entry.top_logprobs, strict=False)) | {token_id: entry.logprob}
    for top_id, logprob in sorted(logprobs.items(), key=lambda top: -top[1]):
        spelled = text.piece(top_id).text
        tops[f"token_id:{top_id}" if spelled in tops else spelled] = _finite(logprob)
    return tops


def _token_logprob(token_id: int, entry: TokenLogprobs, text: ModelText) -> TokenLogprob:
    tops = [
        TopLogprob(*_spelled(text.piece(top_id), logprob))
        for top_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=False)
    ]
    return TokenLogprob(*_spelled(text.piece(token_id), entry.logprob), tops)


def _spelled(piece: Piece, logprob: float) -> tuple[str, float, list[int] | None]:
    return piece.text, _finite(logprob), None if piece.data is None else list(piece.data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
