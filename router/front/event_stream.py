"""A generation as server-sent events. An error before the first byte is an HTTP status, after it a last error frame.

An ASGI response, made by responder.py. A client that stops reading is cut off, so that it cannot hold blocks. One that
waits hears every few seconds that we are there: proxies cut off what is silent for a minute.
"""

import asyncio
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from router.front.choice import Delta
from router.front.errors import ApiError
from router.front.generation import CLIENT_STALLED, ClientGone, Generation

STALL_S = 30.0
"""How long a client may leave a full socket unread."""


SILENCE_S = 5.0
"""After so long without a token a comment goes out, and the status line before it: until then an error has a status."""

COMMENT = b": keep-alive\n\n"


class Writer(Protocol):
    """Turns what comes into bytes of frames."""

    def frames(self, batch: dict[int, Delta]) -> bytes: ...

    def error(self, error: ApiError) -> bytes: ...

    def end(self) -> bytes: ...


def frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Runs generation while it sends; the status line waits for the first token, but not for long."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, writer: Writer) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._is_begun = False
        self._is_silent = True  # since the timer was last set

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._flow = scope["state"]["flow"]
        async with self._generation:
            self._listen_for_silence()
            try:
                await self._stream(send)
            except ClientGone:
                return
            except TimeoutError:
                self._generation.abort(CLIENT_STALLED)
                scope["state"]["abort_connection"]()
            finally:
                self._timer.cancel()

    def _listen_for_silence(self) -> None:
        """A deadline of every wait would cost some microseconds for every token; one timer costs nothing."""
        self._is_silent = True
        self._timer = asyncio.get_running_loop().call_later(SILENCE_S, self._end_silence)

    def _end_silence(self) -> None:
        if self._is_silent:
            self._generation.wake()
        self._listen_for_silence()

    async def _stream(self, send: Send) -> None:
        try:
            async for batch in self._generation.deltas():
                await self._write(send, self._writer.frames(batch) if batch else COMMENT)
        except ApiError as error:
            if not self._is_begun:
                raise
            await self._write(send, self._writer.error(error), more=False)
        else:
            await self._write(send, self._writer.end(), more=False)

    async def _write(self, send: Send, body: bytes, more: bool = True) -> None:
        self._is_silent = False
        if not self._is_begun:
            self._is_begun = True
            await self._pass_on(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._pass_on(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _pass_on(self, send: Send, message: Message) -> None:
        """send waits only while the client's socket is full, and every deadline costs some microseconds."""
        if self._flow.write_paused:
            async with asyncio.timeout(STALL_S):
                await send(message)
        else:
            await send(message)
