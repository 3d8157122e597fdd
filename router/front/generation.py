"""One HTTP call's requests while they run: submitted together, watched, and never left behind.

An asynchronous context: on leaving it, however that happens, whatever still runs is aborted. Used by
completions.py and chat.py through responder.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import TracebackType

from starlette.types import Receive

from protocol.messages import PromptLogprobs, TokenUpdate
from protocol.request import Request
from protocol.stages import Stage
from router.control.dispatch import NoPair, PromptTooLong
from router.control.events import Outcome
from router.control.plane import ControlPlane
from router.control.quarantine import Quarantined
from router.front.choice import Choice, Delta
from router.front.errors import bad_request, from_outcome, unavailable
from router.front.mailbox import CallMailbox, Item
from router.front.metrics import RequestMetrics

CLIENT_GONE = Outcome(Stage.CANCELLED, "client_gone", "the client has gone")
CLIENT_STALLED = Outcome(Stage.CANCELLED, "client_stalled", "the client does not read")
STOP_FOUND = Outcome(Stage.FINISHED, "stop")


class ClientGone(Exception):
    """Nobody is left to answer."""


class Generation:
    """requests and choices go together by index. timeout_s: their deadline, from now."""

    def __init__(
        self,
        control: ControlPlane,
        metrics: RequestMetrics,
        requests: Sequence[Request],
        choices: Sequence[Choice],
        timeout_s: float,
    ) -> None:
        self.requests = requests
        self.choices = choices
        self._control = control
        self._metrics = metrics
        self._mailbox = CallMailbox()
        self._running: set[int] = set()
        self._started_s = time.monotonic()
        self._deadline_s = self._started_s + timeout_s
        self._num_tokens = [0] * len(requests)
        self._last_token_s = [self._started_s] * len(requests)

    def watch(self, receive: Receive) -> "Generation":
        """Say where to learn that the client has gone; the body must have been read from it."""
        self._receive = receive
        return self

    async def __aenter__(self) -> "Generation":
        for index, request in enumerate(self.requests):
            try:
                self._submit(index, request)
            except (NoPair, PromptTooLong, Quarantined) as error:
                self.abort(CLIENT_GONE)
                raise _refusal(error) from None
        self._watcher = asyncio.create_task(self._watch_client())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        self.abort(CLIENT_GONE)

    def abort(self, outcome: Outcome) -> None:
        """End all requests that still run."""
        for index in sorted(self._running):
            self._control.cancel(self.requests[index].request_id, outcome)

    def wake(self) -> None:
        """Have deltas yield now, whatever has come."""
        self._mailbox.wake()

    async def deltas(self) -> AsyncIterator[dict[int, Delta]]:
        """Yield what came, by choice, until all are complete; nothing when woken. Raise ApiError or ClientGone when one
        cannot be.
        """
        num_complete = 0
        while num_complete < len(self.requests):
            items = await self._mailbox.take()
            batch, failure = self._digest(items)
            if batch or not items:
                yield batch
            if failure is not None:
                raise ClientGone if failure.stage is Stage.CANCELLED else from_outcome(failure)
            num_complete = sum(choice.finish_reason is not None for choice in self.choices)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _submit(self, index: int, request: Request) -> None:
        self._control.submit(request, self._deadline_s, partial(self._hear, index))
        self._running.add(index)
        self._metrics.started(len(request.prompt_token_ids))

    def _hear(self, index: int, item: Item | PromptLogprobs) -> None:
        """Called by the control plane, on the event loop, for every token and once for the outcome.

        Log probabilities of prompts no endpoint asks for yet.
        """
        if isinstance(item, PromptLogprobs):
            return
        if isinstance(item, Outcome):
            self._running.discard(index)
            seconds = time.monotonic() - self._started_s
            self._metrics.ended(item, seconds, self._num_tokens[index])
        else:
            self._num_tokens[index] += 1
        self._mailbox.put(index, item)

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.abort(CLIENT_GONE)

    def _digest(self, items: Sequence[tuple[int, Item]]) -> tuple[dict[int, Delta], Outcome | None]:
        batch: dict[int, Delta] = {}
        failure: Outcome | None = None
        now_s = time.monotonic()
        for index, item in items:
            if isinstance(item, TokenUpdate):
                self._feed(index, item, batch, now_s)
            elif item.stage is not Stage.FINISHED and self.choices[index].finish_reason is None:
                failure = failure or item
        return batch, failure

    def _feed(self, index: int, update: TokenUpdate, batch: dict[int, Delta], now_s: float) -> None:
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return  # on its way when a stop string was found
        choice.feed(update, batch.setdefault(index, Delta()))
        self._time(index, update, now_s)
        if choice.finish_reason is not None and index in self._running:
            self._control.cancel(self.requests[index].request_id, STOP_FOUND)

    def _time(self, index: int, update: TokenUpdate, now_s: float) -> None:
        elapsed = now_s - self._last_token_s[index]
        self._last_token_s[index] = now_s
        if update.index == 0:
            self._metrics.first_token(elapsed, update.num_cached_tokens)
        else:
            self._metrics.next_token(elapsed)


def _refusal(error: NoPair | PromptTooLong | Quarantined) -> Exception:
    """The cluster changed between the checks and the submission, or the prompt is one that ends workers."""
    if isinstance(error, NoPair):
        return unavailable(str(error))
    if isinstance(error, Quarantined):
        return from_outcome(Outcome(Stage.FAILED, "quarantined", str(error)))
    return bad_request(str(error), "max_tokens", "context_length_exceeded")
