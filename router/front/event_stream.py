"""The sending side of a stream of server-sent events. Used by call.py, which says what is sent.

A client that stops reading is noticed. One that waits hears every few seconds that we are there: proxies cut off what
is silent for a minute.
"""

import asyncio
from collections.abc import Callable

from starlette.types import Message, Scope, Send

STALL_S = 30.0
"""How long a client may leave a full socket unread."""

SILENCE_S = 5.0
"""After so long without a token a comment goes out, and the status line before it: until then an error has a status."""

COMMENT = b": keep-alive\n\n"

_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)


def frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class EventStream:
    """on_silence is called, until close, whenever nothing was written for a while.

    is_begun: whether the status line is out, which waits for the first bytes.
    """

    def __init__(self, scope: Scope, send: Send, on_silence: Callable[[], None]) -> None:
        self.is_begun = False
        self._state = scope["state"]  # GuardedProtocol's: see http_protocol.py
        self._send = send
        self._on_silence = on_silence
        self._listen_for_silence()

    async def write(self, body: bytes, more: bool = True) -> None:
        """Send these bytes, the last ones unless there are more. Raise TimeoutError when the client does not read."""
        self._is_silent = False
        if not self.is_begun:
            self.is_begun = True
            await self._pass_on({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        await self._pass_on({"type": "http.response.body", "body": body, "more_body": more})

    def cut_off(self) -> None:
        """Break the connection."""
        self._state["abort_connection"]()

    def close(self) -> None:
        """Listen no more for silence."""
        self._timer.cancel()

    def _listen_for_silence(self) -> None:
        """A deadline of every wait would cost some microseconds for every token; one timer costs nothing."""
        self._is_silent = True
        self._timer = asyncio.get_running_loop().call_later(SILENCE_S, self._end_silence)

    def _end_silence(self) -> None:
        if self._is_silent:
            self._on_silence()
        self._listen_for_silence()

    async def _pass_on(self, message: Message) -> None:
        """send waits only while the client's socket is full, and every deadline costs some microseconds."""
        if self._state["flow"].write_paused:
            async with asyncio.timeout(STALL_S):
                await self._send(message)
        else:
            await self._send(message)
