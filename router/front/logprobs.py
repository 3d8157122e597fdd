"""Log probabilities in the two forms of OpenAI's interface. Used by completions.py and chat.py."""

from collections.abc import Sequence

from protocol.messages import TokenLogprobs
from router.front.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from router.front.text import ModelText

LOWEST = -9999.0
"""JSON has no infinity; clients of this interface know this number for "impossible"."""

DrawnTokens = Sequence[tuple[int, TokenLogprobs]]
"""Tokens that were drawn, with their log probabilities."""


def completion_logprobs(drawn: DrawnTokens, text: ModelText, offset: int) -> CompletionLogprobs:
    """offset: characters of the choice before these tokens. The drawn token is always among the top ones."""
    tokens = [text.token_text(token_id) for token_id, _ in drawn]
    offsets = [offset + sum(map(len, tokens[:index])) for index in range(len(tokens))]
    tops = [_tops(token, entry, text) for token, (_, entry) in zip(tokens, drawn, strict=True)]
    return CompletionLogprobs(tokens, [_finite(entry.logprob) for _, entry in drawn], tops, offsets)


def chat_logprobs(drawn: DrawnTokens, text: ModelText) -> ChatLogprobs:
    return ChatLogprobs([_token_logprob(token_id, entry, text) for token_id, entry in drawn])


def _tops(token: str, entry: TokenLogprobs, text: ModelText) -> dict[str, float]:
    pairs = zip(entry.top_token_ids, entry.top_logprobs, strict=False)
    tops: dict[str, float] = {}
    for token_id, logprob in pairs:
        tops.setdefault(text.token_text(token_id), _finite(logprob))  # the likelier of two tokens with one spelling
    tops.setdefault(token, _finite(entry.logprob))
    return tops


def _token_logprob(token_id: int, entry: TokenLogprobs, text: ModelText) -> TokenLogprob:
    token = text.token_text(token_id)
    tops = [
        TopLogprob(text.token_text(top_id), _finite(logprob), _utf8(text.token_text(top_id)))
        for top_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=False)
    ]
    return TokenLogprob(token, _finite(entry.logprob), _utf8(token), tops)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _utf8(token: str) -> list[int]:
    return list(token.encode("utf-8", errors="replace"))
