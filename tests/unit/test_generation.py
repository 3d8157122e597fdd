"""What a call makes of tokens and endings that wait together, because its client read slowly."""

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from protocol.identity import new_attempt
from protocol.messages import TokenUpdate
from protocol.request import Request, SamplingParams
from protocol.stages import Stage
from router.control.events import Outcome
from router.front.choice import Choice, Delta
from router.front.detokenizer import Detokenizer
from router.front.errors import ApiError
from router.front.generation import Generation
from router.front.mailbox import Item
from router.front.metrics import RequestMetrics
from tests.integration.router_process import tiny_tokenizer

LOST = Outcome(Stage.FAILED, "worker_lost", "the decode worker of this request was lost")
TOKENIZER = tiny_tokenizer()


class Control:
    """Says at once all that will ever be said of a request."""

    def __init__(self, items: list[Item]) -> None:
        self._items = items

    def submit(self, request: Request, deadline_s: float, client: Any) -> None:
        for item in self._items:
            client(item)

    def cancel(self, request_id: str, outcome: Outcome) -> None: ...


async def generate(text: str, stop: str) -> list[Delta]:
    """Return the deltas of a request whose tokens spell text and whose worker is lost then."""
    token_ids = TOKENIZER.encode(text).ids
    attempt = new_attempt("r", 0, 1, 2)
    control: Any = Control([*(TokenUpdate(attempt, i, token_id) for i, token_id in enumerate(token_ids)), LOST])
    request = Request("r", (1, 2), SamplingParams(max_tokens=100, seed=0))
    choice = Choice(Detokenizer(TOKENIZER, frozenset()), [stop])
    metrics = RequestMetrics(CollectorRegistry(), "m")
    generation = Generation(control, metrics, [request], [choice], timeout_s=60).watch(asyncio.Event().wait)  # type: ignore[arg-type]
    async with generation:
        return [batch[0] async for batch in generation.deltas()]


def test_a_worker_lost_after_the_stop_string_is_no_failure() -> None:
    [delta] = asyncio.run(generate("one two three four", stop=" three"))
    assert delta.text == "one two"


def test_a_call_that_is_woken_yields_nothing_and_goes_on() -> None:
    class Silent:
        def submit(self, request: Request, deadline_s: float, client: Any) -> None:
            self.client = client

        def cancel(self, request_id: str, outcome: Outcome) -> None: ...

    async def scenario() -> list[str | None]:
        control: Any = Silent()
        request = Request("r", (1, 2), SamplingParams(max_tokens=100, seed=0))
        metrics = RequestMetrics(CollectorRegistry(), "m")
        generation = Generation(control, metrics, [request], [Choice(None)], 60).watch(asyncio.Event().wait)  # type: ignore[arg-type]
        seen = []
        async with generation:
            generation.wake()
            async for batch in generation.deltas():
                seen.append(batch[0].token_ids if batch else None)
                control.client(TokenUpdate(new_attempt("r", 0, 1, 2), 0, 7, finish_reason="length"))
        return seen

    assert asyncio.run(scenario()) == [None, [7]]


def test_a_worker_lost_before_the_stop_string_is_one() -> None:
    with pytest.raises(ApiError, match="decode worker of this request was lost"):
        asyncio.run(generate("one two three four", stop="five"))
