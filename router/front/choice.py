"""One choice of a response while its tokens come in: text, stop strings, counts, and why it ended.

Used by completions.py and chat.py, streamed or not. Pure: it holds no sockets and starts nothing.
"""

from collections.abc import Collection, Sequence

import msgspec

from protocol.messages import TokenLogprobs, TokenUpdate
from router.front.detokenizer import Detokenizer
from router.front.stop_strings import StopStrings


class Delta(msgspec.Struct):
    """What one or several tokens added to a choice."""

    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = msgspec.field(default_factory=list)

    def extend(self, later: "Delta") -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs


class Choice:
    """Accumulates nothing but counts; the whole text is the sum of the deltas."""

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        stop_token_ids: Collection[int] = (),
        shows_stop: bool = False,
    ) -> None:
        """stop_token_ids: those that the client chose, as against the model's own. shows_stop: what ends the text, a
        stop string or a token, is part of it.
        """
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, shows_stop)
        self._shows_stop = shows_stop
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def feed(self, update: TokenUpdate, delta: Delta) -> None:
        """Add what update brings to delta. Sets finish_reason when the choice is complete."""
        self.num_tokens += 1
        self.num_cached_tokens += update.num_cached_tokens
        delta.token_ids.append(update.token_id)
        if update.logprobs is not None:
            delta.logprobs.append((update.token_id, update.logprobs))
        delta.text += self._visible(self._text_of(update))
        if self._stops.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.matched
        elif update.finish_reason is not None:
            self.finish_reason = update.finish_reason
            if update.finish_reason == "stop" and update.token_id in self._stop_token_ids:
                self.stop_reason = update.token_id
            delta.text += self._stops.flush()

    def _text_of(self, update: TokenUpdate) -> str:
        if self._detokenizer is None:
            return ""
        is_hidden = update.finish_reason == "stop" and not self._shows_stop
        text = "" if is_hidden else self._detokenizer.feed(update.token_id)
        return text + self._detokenizer.flush() if update.finish_reason is not None else text

    def _visible(self, text: str) -> str:
        """Before min_tokens have come, nothing counts as a stop string."""
        return text if self.num_tokens <= self._min_tokens else self._stops.feed(text)
