"""One choice of a call: its request, and its text, counts and end while its tokens come in.

Used by call.py, streamed or not. Pure: it holds no sockets and starts nothing.
"""

from collections.abc import Sequence

import msgspec

from protocol.messages import TokenLogprobs, TokenUpdate
from protocol.request import Request
from router.front.detokenizer import Detokenizer
from router.front.requests import Prompt
from router.front.stop_strings import StopStrings


class Delta(msgspec.Struct, frozen=True):
    """What one or several tokens added to a choice. is_first: nothing of the choice came before."""

    text: str
    token_ids: list[int]
    logprobs: list[tuple[int, TokenLogprobs]]
    is_first: bool


class Choice:
    """Keeps counts, and what was not yet taken; the whole text is the sum of the deltas.

    is_running, num_heard and last_token_s are its call's: whether the request runs, how many tokens have come, of which
    some may not have been fed yet, and when the last one was.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        request: Request,
        detokenizer: Detokenizer | None,
        stops: Sequence[str] = (),
        shows_stop: bool = False,
    ) -> None:
        """shows_stop: what ends the text, a stop string or a token, is part of it."""
        self.index = index
        self.prompt = prompt
        self.request = request
        self.is_running = False
        self.num_heard = 0
        self.last_token_s = 0.0
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops, shows_stop)
        self._shows_stop = shows_stop
        self._is_first = True
        self._begin_delta()

    @property
    def has_news(self) -> bool:
        """Whether there is something to take."""
        return bool(self._token_ids)

    def feed(self, update: TokenUpdate) -> None:
        """Add what update brings. Sets finish_reason when the choice is complete."""
        self.num_tokens += 1
        self.num_cached_tokens += update.num_cached_tokens
        self._token_ids.append(update.token_id)
        if update.logprobs is not None:
            self._logprobs.append((update.token_id, update.logprobs))
        self._texts.append(self._visible(self._text_of(update)))
        if self._stops.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.matched
        elif update.finish_reason is not None:
            self._finish(update.finish_reason, update.token_id)

    def take(self) -> Delta:
        """Return what has come since this was called last."""
        delta = Delta("".join(self._texts), self._token_ids, self._logprobs, self._is_first)
        self._is_first = False
        self._begin_delta()
        return delta

    def _begin_delta(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[tuple[int, TokenLogprobs]] = []

    def _finish(self, reason: str, token_id: int) -> None:
        """A token that the client chose to stop at is the reason, as against the model's own."""
        self.finish_reason = reason
        if reason == "stop" and token_id in self.request.sampling.chosen_stop_token_ids:
            self.stop_reason = token_id
        self._texts.append(self._stops.flush())

    def _text_of(self, update: TokenUpdate) -> str:
        if self._detokenizer is None:
            return ""
        is_hidden = update.finish_reason == "stop" and not self._shows_stop
        text = "" if is_hidden else self._detokenizer.feed(update.token_id)
        return text + self._detokenizer.flush() if update.finish_reason is not None else text

    def _visible(self, text: str) -> str:
        """Before min_tokens have come, nothing counts as a stop string."""
        return text if self.num_tokens <= self.request.sampling.min_tokens else self._stops.feed(text)
