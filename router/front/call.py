"""One completion call, from its checked body to its last byte: what the text and the chat endpoint have in common.

A call submits the requests of its choices together, gives each choice what comes for it, and sends the whole answer or
a stream of events. However it ends, nothing of it runs on. completions.py and chat.py say how answers are written.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Generic

import msgspec
from msgspec import UNSET
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from protocol.identity import new_request_id
from protocol.messages import PromptLogprobs, TokenUpdate
from protocol.stages import Stage
from router.control.dispatch import NoPair, PromptTooLong
from router.control.events import Outcome
from router.control.quarantine import Quarantined
from router.front.choice import Choice, Delta
from router.front.errors import ApiError, bad_request, from_outcome, unavailable
from router.front.event_stream import COMMENT, EventStream, frame
from router.front.logprobs import Spelling
from router.front.requests import Prompt
from router.front.responses import CachedTokens, Usage, UsageField
from router.front.schemas import BodyT
from router.front.serving import Serving

CLIENT_GONE = Outcome(Stage.CANCELLED, "client_gone", "the client has gone")
CLIENT_STALLED = Outcome(Stage.CANCELLED, "client_stalled", "the client does not read")
STOP_FOUND = Outcome(Stage.FINISHED, "stop")


class ClientGone(Exception):
    """Nobody is left to answer."""


class Call(ABC, Generic[BodyT]):
    """An ASGI application that answers this one call. Its deadline counts from when it was made.

    What the control plane says waits in a list until the call comes to it, which may be late when its client reads
    slowly. The list needs no bound: no request can bring more than max_tokens tokens.
    """

    def __init__(self, serving: Serving, body: BodyT, prompts: Sequence[Prompt]) -> None:
        """Raise ApiError 400 or 503 when there is no room for an answer, or a parameter cannot be honoured."""
        self.serving = serving
        self.body = body
        self.request_id = new_request_id()
        self.created = int(time.time())
        self.spelling = Spelling(
            serving.text, body.skip_special_tokens is not False, bool(body.return_tokens_as_token_ids)
        )
        self.choices = [self._choice(index, prompt, len(prompts)) for index, prompt in enumerate(prompts)]
        self._num_unfinished = len(self.choices)
        self._started_s = time.monotonic()
        self._items: list[tuple[Choice, TokenUpdate | Outcome]] = []
        self._is_woken = asyncio.Event()
        self._failure: Outcome | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run it. Raise ApiError for what cannot be answered and is not yet begun; the body must have been read."""
        watcher = asyncio.create_task(self._watch_client(receive))
        try:
            self._submit()
            await (self._stream(scope, send) if self.body.stream else self._answer_whole(scope, receive, send))
        except ClientGone:
            return
        finally:
            watcher.cancel()
            self._abort(CLIENT_GONE)

    @abstractmethod
    def written(self, news: Sequence[tuple[Choice, Delta]], usage: UsageField) -> msgspec.Struct:
        """Return the answer, or a chunk of it where it is streamed. Without news it is the chunk for the usage."""

    # --- its requests -------------------------------------------------------------------------------------------------

    def _choice(self, index: int, prompt: Prompt, num_prompts: int) -> Choice:
        serving, body = self.serving, self.body
        request_id = self.request_id if num_prompts == 1 else f"{self.request_id}-{index}"
        request = serving.requests.request(request_id, prompt, body)
        before = () if prompt.begins_text else prompt.token_ids
        detokenizer = serving.text.detokenizer(before, self.spelling.skips_special)
        return Choice(index, prompt, request, detokenizer, body.stops, body.shows_stop)

    def _submit(self) -> None:
        """The cluster may have changed since the checks, or a prompt may be one that ends workers."""
        deadline_s = self._started_s + self.serving.timeout_s
        for choice in self.choices:
            try:
                self.serving.control.submit(choice.request, deadline_s, partial(self._hear, choice))
            except NoPair as error:
                raise unavailable(str(error)) from None
            except PromptTooLong as error:
                raise bad_request(str(error), "max_tokens", "context_length_exceeded") from None
            except Quarantined as error:
                raise from_outcome(Outcome(Stage.FAILED, "quarantined", str(error))) from None
            choice.is_running = True
            self.serving.metrics.started(len(choice.prompt.token_ids))

    def _abort(self, outcome: Outcome) -> None:
        """End all requests that still run."""
        for choice in self.choices:
            if choice.is_running:
                self.serving.control.cancel(choice.request.request_id, outcome)

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._abort(CLIENT_GONE)

    # --- what comes of them -------------------------------------------------------------------------------------------

    def _hear(self, choice: Choice, item: TokenUpdate | PromptLogprobs | Outcome) -> None:
        """Called by the control plane, on the event loop, for every token and once for the outcome.

        Log probabilities of prompts no endpoint asks for yet.
        """
        if isinstance(item, PromptLogprobs):
            return
        if isinstance(item, Outcome):
            choice.is_running = False
            self.serving.metrics.ended(item, time.monotonic() - self._started_s, choice.num_heard)
        else:
            choice.num_heard += 1
        self._items.append((choice, item))
        self._is_woken.set()

    async def _take(self) -> bool:
        """Give the choices what has come, once something has; return False when it was woken for nothing."""
        await self._is_woken.wait()
        self._is_woken.clear()
        items, self._items = self._items, []
        now_s = time.monotonic()
        for choice, item in items:
            if choice.finish_reason is not None:
                continue  # on its way when a stop string was found
            if isinstance(item, TokenUpdate):
                self._feed(choice, item, now_s)
            elif item.stage is not Stage.FINISHED:
                self._failure = self._failure or item
        return bool(items)

    def _feed(self, choice: Choice, update: TokenUpdate, now_s: float) -> None:
        choice.feed(update)
        if update.index == 0:
            self.serving.metrics.first_token(now_s - self._started_s, update.num_cached_tokens)
        else:
            self.serving.metrics.next_token(now_s - choice.last_token_s)
        choice.last_token_s = now_s
        if choice.finish_reason is not None:
            self._num_unfinished -= 1
            if choice.is_running:
                self.serving.control.cancel(choice.request.request_id, STOP_FOUND)

    def _is_complete(self) -> bool:
        """Raise ApiError or ClientGone when it never will be."""
        if self._failure is not None:
            raise ClientGone if self._failure.stage is Stage.CANCELLED else from_outcome(self._failure)
        return self._num_unfinished == 0

    # --- its answer ---------------------------------------------------------------------------------------------------

    async def _answer_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not self._is_complete():
            await self._take()
        answer = msgspec.json.encode(self.written([(choice, choice.take()) for choice in self.choices], self._usage()))
        await Response(answer, media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, send: Send) -> None:
        """A client that stops reading is cut off, so that it cannot hold blocks."""
        stream = EventStream(scope, send, self._is_woken.set)
        try:
            await stream.write(await self._send_news(stream), more=False)
        except TimeoutError:
            self._abort(CLIENT_STALLED)
            stream.cut_off()
        finally:
            stream.close()

    async def _send_news(self, stream: EventStream) -> bytes:
        """Send what comes, and return the last frames. An error before the first byte is raised, after it a frame."""
        options = self.body.stream_options
        has_last_usage = bool(options and options.include_usage)
        has_every_usage = bool(options and options.continuous_usage_stats)
        no_usage = None if has_last_usage else UNSET
        try:
            while not self._is_complete():
                has_come = await self._take()
                if news := [choice for choice in self.choices if choice.has_news]:
                    usage = self._usage() if has_every_usage else no_usage
                    await stream.write(b"".join([self._frame([(choice, choice.take())], usage) for choice in news]))
                elif not has_come:
                    await stream.write(COMMENT)
        except ApiError as error:
            if not stream.is_begun:
                raise
            return frame(error.body())
        return (self._frame([], self._usage()) if has_last_usage else b"") + frame(b"[DONE]")

    def _frame(self, news: Sequence[tuple[Choice, Delta]], usage: UsageField) -> bytes:
        return frame(msgspec.json.encode(self.written(news, usage)))

    def _usage(self) -> Usage:
        prompt_tokens = sum(len(choice.prompt.token_ids) for choice in self.choices)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        cached = CachedTokens(sum(choice.num_cached_tokens for choice in self.choices))
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, cached)
