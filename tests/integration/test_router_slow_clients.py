"""Clients that send or read too slowly, with the deadlines shortened: they are cut off and hold nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from protocol.identity import new_attempt
from protocol.messages import TokenUpdate
from protocol.request import Request, SamplingParams
from protocol.stages import Stage
from protocol.topology import RouterSection
from router.control.events import Outcome
from router.control.plane import Client
from router.front import body, event_stream, http_protocol
from router.front.app import render
from router.front.body import BodyReader
from router.front.call import CLIENT_STALLED
from router.front.completions import CompletionCall
from router.front.errors import ApiError
from router.front.http_protocol import GuardedProtocol
from router.front.metrics import RequestMetrics
from router.front.quota import Quota
from router.front.requests import Prompt
from router.front.responses import Completion, CompletionChoice
from router.front.schemas import CompletionBody
from router.process import QuietServer, bind

SHORT_S = 0.2


class Control:
    """Says nothing of a request until it is over."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None

    def submit(self, request: Request, deadline_s: float, client: Client) -> None:
        self.client = client

    def cancel(self, request_id: str, outcome: Outcome) -> None:
        """End it; its client hears how, once."""
        if self.outcome is None:
            self.outcome = outcome
            self.client(outcome)


class EndlessControl(Control):
    """Has tokens come without an end."""

    def submit(self, request: Request, deadline_s: float, client: Client) -> None:
        super().submit(request, deadline_s, client)
        self._saying = asyncio.create_task(self._say())

    async def _say(self) -> None:
        for index in count():
            if self.outcome is not None:
                return
            self.client(TokenUpdate(new_attempt("r", 0, 1, 2), index, 5))
            await asyncio.sleep(0)


class LargeChunks(CompletionCall):
    """A stream whose chunks soon fill a socket."""

    def written(self, news: object, usage: object) -> Completion:
        choice = CompletionChoice(index=0, text="x" * 65536)
        return Completion(id="", created=0, model="", choices=[choice])


def stream_of(control: Control) -> LargeChunks:
    serving: Any = SimpleNamespace(
        control=control,
        metrics=RequestMetrics(CollectorRegistry(), "m"),
        requests=SimpleNamespace(request=lambda *_: Request("r", (1,), SamplingParams(1 << 20, seed=0))),
        text=SimpleNamespace(detokenizer=lambda *_: None),
        timeout_s=60.0,
    )
    return LargeChunks(serving, CompletionBody(prompt="", stream=True), [Prompt((1,))])


@contextlib.asynccontextmanager
async def serving(*routes: Route, connections: Quota | None = None) -> AsyncIterator[int]:
    """The server as the router configures it, around other endpoints; yields its port."""
    protocol = partial(GuardedProtocol, connections or Quota(100, 100))
    app = Starlette(routes=list(routes), exception_handlers={ApiError: lambda _, error: render(error)})
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False)
    server = QuietServer(config)
    listener = bind(RouterSection(port=0))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    yield listener.getsockname()[1]
    server.should_exit = True
    await asyncio.wait_for(running, 5)


async def closed_after(port: int, sent: bytes) -> bytes:
    """Send these bytes and no more; return what comes until the server closes, within two seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        answer = await asyncio.wait_for(reader.read(), 2)
    writer.close()
    return answer


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost:", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT"])
def test_a_header_that_never_ends_costs_its_connection(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", SHORT_S)

    async def scenario() -> None:
        async with serving(Route("/", lambda request: Response(b"fine"))) as port:
            answer = await closed_after(port, sent)
            assert answer.count(b"fine") == sent.count(b"\r\n\r\n")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n", b"x"),  # of a body that nobody reads
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n"),
    ],
)
def test_what_comes_behind_an_answer_and_begins_no_request_costs_its_connection(
    monkeypatch: pytest.MonkeyPatch, asked: bytes, more: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", SHORT_S)

    async def scenario() -> None:
        async with serving(Route("/", lambda request: Response(b"fine"))) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(asked)
            await reader.readuntil(b"fine")
            closing = asyncio.create_task(reader.read())
            for _ in range(40):
                with contextlib.suppress(ConnectionError):
                    writer.write(more)
                if (await asyncio.wait({closing}, timeout=0.05))[0]:
                    break
            assert closing.done(), "the connection is still open"
            writer.close()
            await asyncio.wait({closing})

    asyncio.run(scenario())


def test_a_body_that_never_ends_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", SHORT_S)

    async def endpoint(http: HttpRequest) -> Response:
        return Response(bytes(await BodyReader(Quota(1 << 20, 1 << 20), 100).read(http)))

    async def scenario() -> None:
        async with serving(Route("/", endpoint, methods=["POST"])) as port:
            answer = await closed_after(
                port, b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 5\r\n\r\nab"
            )
            assert answer.startswith(b"HTTP/1.1 408")

    asyncio.run(scenario())


def test_a_stream_without_tokens_says_that_it_lives_and_then_why_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "SILENCE_S", 0.05)

    async def scenario() -> None:
        control = Control()

        async def endpoint(http: HttpRequest) -> LargeChunks:
            return stream_of(control)

        async with serving(Route("/", endpoint)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            answer = b""
            while answer.count(b": keep-alive\n\n") < 3:
                answer += await asyncio.wait_for(reader.read(4096), 5)
            assert answer.startswith(b"HTTP/1.1 200")
            control.cancel("r", Outcome(Stage.FAILED, "worker_lost", "the worker is lost"))
            assert b'data: {"error":{"message":"the worker is lost"' in await asyncio.wait_for(reader.read(), 5)
            writer.close()

    asyncio.run(scenario())


def test_unfinished_bodies_of_one_address_have_a_bound_and_small_ones_still_come_in() -> None:
    memory = Quota(1 << 30, 1 << 20)

    async def endpoint(http: HttpRequest) -> Response:
        return Response(b"%d" % len(await BodyReader(memory, 100).read(http)))

    async def scenario() -> None:
        async with serving(Route("/", endpoint, methods=["POST"])) as port:
            head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head % 1_050_000 + b" " * 1_000_000)
            await writer.drain()
            while memory.take("127.0.0.1", 200_000):  # until no second one fits beside the first
                memory.give_back("127.0.0.1", 200_000)
                await asyncio.sleep(0.001)
            assert (await closed_after(port, head % 1_000_000 + b" " * 300_000)).startswith(b"HTTP/1.1 429")
            assert (await closed_after(port, head % 60_000 + b" " * 60_000)).endswith(b"60000")
            writer.write(b" " * 50_000)
            assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"1050000")
            assert (await closed_after(port, head % 1_000_000 + b" " * 1_000_000)).endswith(b"1000000")
            writer.close()

    asyncio.run(scenario())


def test_connections_beyond_an_addresss_share_are_told_so_and_closed() -> None:
    async def scenario() -> None:
        get = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        async with serving(Route("/", lambda request: Response(b"fine")), connections=Quota(100, 2)) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            refused = await closed_after(port, b"")
            assert refused.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1" in refused
            held.pop()[1].close()
            for _ in range(100):  # one place is free once the server has seen that
                if (await closed_after(port, get)).endswith(b"fine"):
                    break
            assert (await closed_after(port, get)).endswith(b"fine")
            held.pop()[1].close()

    asyncio.run(scenario())


def test_a_client_that_does_not_read_is_cut_off_and_its_request_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "STALL_S", SHORT_S)
    control = EndlessControl()

    async def endpoint(http: HttpRequest) -> LargeChunks:
        return stream_of(control)

    async def scenario() -> None:
        async with serving(Route("/", endpoint)) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            for _ in range(400):
                await asyncio.sleep(0.01)
                if control.outcome is not None:
                    break
            writer.close()

    asyncio.run(scenario())
    assert control.outcome == CLIENT_STALLED
