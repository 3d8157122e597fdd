"""Clients that send or read too slowly, with the deadlines shortened: they are cut off and hold nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from protocol.topology import RouterSection
from router.control.events import Outcome
from router.front import body, event_stream, http_protocol
from router.front.body import read_body
from router.front.choice import Delta
from router.front.errors import ApiError
from router.front.event_stream import EventStream
from router.front.generation import CLIENT_GONE, CLIENT_STALLED
from router.front.http_protocol import GuardedProtocol
from router.process import QuietServer, bind

SHORT_S = 0.2


class EndlessGeneration:
    """Stands for a request whose tokens never end."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None

    async def __aenter__(self) -> "EndlessGeneration":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort(CLIENT_GONE)

    def abort(self, outcome: Outcome) -> None:
        self.outcome = self.outcome or outcome

    async def deltas(self) -> AsyncIterator[dict[int, Delta]]:
        while True:
            yield {0: Delta("x")}
            await asyncio.sleep(0)


class LargeFrames:
    def frames(self, batch: dict[int, Delta]) -> bytes:
        return b"x" * 65536


@contextlib.asynccontextmanager
async def serving(*routes: Route) -> AsyncIterator[int]:
    """The server as the router configures it, around other endpoints; yields its port."""
    app = Starlette(routes=list(routes), exception_handlers={ApiError: lambda _, error: Response(b"", error.status)})
    config = uvicorn.Config(app, http=GuardedProtocol, ws="none", lifespan="off", log_config=None, access_log=False)
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

    async def endpoint(request: Request) -> Response:
        return Response(await read_body(request))

    async def scenario() -> None:
        async with serving(Route("/", endpoint, methods=["POST"])) as port:
            answer = await closed_after(
                port, b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 5\r\n\r\nab"
            )
            assert answer.startswith(b"HTTP/1.1 408")

    asyncio.run(scenario())


def test_a_client_that_does_not_read_is_cut_off_and_its_request_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "STALL_S", SHORT_S)
    generation = EndlessGeneration()

    async def endpoint(request: Request) -> Response:
        return EventStream(generation, LargeFrames())  # type: ignore[arg-type]

    async def scenario() -> None:
        async with serving(Route("/", endpoint)) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            for _ in range(400):
                await asyncio.sleep(0.01)
                if generation.outcome is not None:
                    break
            writer.close()

    asyncio.run(scenario())
    assert generation.outcome == CLIENT_STALLED
