"""The answer to a request whose body will not be read to its end, before the connection is closed. Used by app.py.

A client that writes all before it reads would never see an answer if the connection closed under its hands: the
kernel throws away what was sent when more comes in. So the answer goes out at once, and what still comes is dropped.
"""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SILENCE_S = 1.0
"""A client that has written nothing for so long has begun to read."""
MAX_S = 10.0
MAX_BYTES = 64 << 20


class LastAnswer(Response):
    """A whole answer; the connection stays open for as long as the client goes on writing, within bounds."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(MAX_S):
                await _drop_rest(receive)
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop_rest(receive: Receive) -> None:
    num_bytes, more = 0, True
    while more and num_bytes < MAX_BYTES:
        message = await asyncio.wait_for(receive(), SILENCE_S)
        num_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)
