"""What a call makes of tokens and endings that wait together, because its client read slowly."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from protocol.identity import new_attempt
from protocol.messages import TokenUpdate
from protocol.request import Request, SamplingParams
from protocol.stages import Stage
from router.control.events import Outcome
from router.front import event_stream
from router.front.completions import CompletionCall
from router.front.detokenizer import Detokenizer
from router.front.errors import ApiError
from router.front.metrics import RequestMetrics
from router.front.requests import Prompt
from router.front.schemas import CompletionBody
from tests.integration.router_process import tiny_tokenizer

LOST = Outcome(Stage.FAILED, "worker_lost", "the decode worker of this request was lost")
ATTEMPT = new_attempt("r", 0, 1, 2)
TOKENIZER = tiny_tokenizer()

Client = Callable[[TokenUpdate | Outcome], None]


class Control:
    """Has a request's client hear what begin says of it, and nothing else."""

    def __init__(self, begin: Callable[[Client], None]) -> None:
        self._begin = begin

    def submit(self, request: Request, deadline_s: float, client: Client) -> None:
        self._begin(client)

    def cancel(self, request_id: str, outcome: Outcome) -> None: ...


def call_of(begin: Callable[[Client], None], body: CompletionBody) -> CompletionCall:
    params = SamplingParams(max_tokens=100, seed=0)
    serving: Any = SimpleNamespace(
        control=Control(begin),
        metrics=RequestMetrics(CollectorRegistry(), "m"),
        requests=SimpleNamespace(request=lambda request_id, prompt, body: Request("r", prompt.token_ids, params)),
        text=SimpleNamespace(detokenizer=lambda before, skips_special: Detokenizer(TOKENIZER, frozenset(), before)),
        model_name="m",
        timeout_s=60,
    )
    return CompletionCall(serving, body, [Prompt((1, 2))])


async def answer_of(call: CompletionCall, hear: Callable[[bytes], None] = lambda piece: None) -> list[bytes]:
    """Return the pieces of its answer. hear: what its client does about each."""
    pieces: list[bytes] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: dict[str, Any]) -> None:
        pieces.append(message.get("body", b""))
        hear(pieces[-1])

    flow = SimpleNamespace(write_paused=False)
    await asyncio.wait_for(call({"type": "http", "state": {"flow": flow}}, receive, send), 10)  # type: ignore[arg-type]
    return [piece for piece in pieces if piece]


def generate(text: str, stop: str) -> list[bytes]:
    """Return the answer of a request whose tokens spell text and whose worker is lost then; all is said at once."""

    def begin(client: Client) -> None:
        for index, token_id in enumerate(TOKENIZER.encode(text).ids):
            client(TokenUpdate(ATTEMPT, index, token_id))
        client(LOST)

    async def scenario() -> list[bytes]:
        return await answer_of(call_of(begin, CompletionBody(prompt="", stop=stop)))

    return asyncio.run(scenario())


def test_a_worker_lost_after_the_stop_string_is_no_failure() -> None:
    [answer] = generate("one two three four", stop=" three")
    assert msgspec.json.decode(answer)["choices"][0]["text"] == "one two"


def test_a_worker_lost_before_the_stop_string_is_one() -> None:
    with pytest.raises(ApiError, match="decode worker of this request was lost"):
        generate("one two three four", stop="five")


def test_a_stream_that_is_woken_by_silence_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "SILENCE_S", 0.05)
    clients: list[Client] = []

    def hear(piece: bytes) -> None:
        if piece == event_stream.COMMENT and clients:
            clients.pop()(TokenUpdate(ATTEMPT, 0, 7, finish_reason="length"))

    async def scenario() -> list[bytes]:
        return await answer_of(
            call_of(clients.append, CompletionBody(prompt="", stream=True, return_token_ids=True)), hear
        )

    comment, chunk, end = asyncio.run(scenario())
    assert comment == event_stream.COMMENT
    assert b'"token_ids":[7]' in chunk
    assert end == b"data: [DONE]\n\n"
