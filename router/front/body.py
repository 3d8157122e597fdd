"""Reads an HTTP request's body within limits and a deadline, whatever its headers claim. For the POST endpoints.

Limits are of one body's bytes, of what it will be once decoded, and of the memory of all bodies that are not yet whole.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from router.front.errors import ApiError, bad_request, overloaded
from router.front.json_meter import JsonMeter
from router.front.quota import Quota, owner_of

MAX_BODY_BYTES = 4 << 20
BODY_TIMEOUT_S = 30.0
FREE_BYTES = 64 << 10
"""A body's first bytes, which no quota counts: whoever holds large ones unfinished cannot keep small ones out."""
MAX_VALUES = 1 << 18
"""Decoding so many takes some 20 ms, in which nobody's stream moves."""
MAX_CONTAINERS = 1 << 15


class BodyReader:
    """memory: bytes of unfinished bodies. max_prompt_tokens: a list of so many ids is never too much."""

    def __init__(self, memory: Quota, max_prompt_tokens: int) -> None:
        self._memory = memory
        self._max_values = max(MAX_VALUES, max_prompt_tokens + 1024)

    async def read(self, request: Request) -> bytearray:
        """Return the body. Raise ApiError 400, 408, 413, 415 or 429, or ClientDisconnect when the client has gone."""
        _check_kind(request.headers)
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
            raise _too_large()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._read(request)
        except TimeoutError:
            message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            raise ApiError(408, message, code="request_timeout", close=True) from None

    async def _read(self, request: Request) -> bytearray:
        owner, num_taken = owner_of(request.scope.get("client")), 0
        body, meter = bytearray(), JsonMeter()
        more = True
        try:
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                piece, more = message.get("body", b""), message.get("more_body", False)
                wanted = max(0, len(body) + len(piece) - FREE_BYTES) - num_taken
                if not self._memory.take(owner, wanted):
                    raise overloaded("too many large bodies are on their way already", close=True)
                num_taken += wanted
                body += piece
                self._check(body, piece, meter, is_part=more)
        finally:
            self._memory.give_back(owner, num_taken)
        return body

    def _check(self, body: bytearray, piece: bytes, meter: JsonMeter, is_part: bool) -> None:
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
        meter.feed(piece)
        if meter.num_values > self._max_values:
            raise bad_request(f"the body holds more than {self._max_values} values", close=is_part)
        if meter.num_containers > MAX_CONTAINERS:
            raise bad_request(f"the body holds more than {MAX_CONTAINERS} lists and objects", close=is_part)


def _check_kind(headers: Headers) -> None:
    """Other kinds than JSON a browser sends from any page without asking first, and so it does with none."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or kind.endswith("+json")
    if not is_json and (kind or "origin" in headers):
        raise _unsupported(f"the content-type must be application/json, not {kind[:64] or 'left out'}", "content-type")
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise _unsupported(
            f"a body with content-encoding {coding[:64]} is not read; send it as it is", "content-encoding"
        )


def _unsupported(message: str, param: str) -> ApiError:
    return ApiError(415, message, param=param, code="unsupported_media_type")


def _too_large() -> ApiError:
    """The rest of the body will not be read, so the connection is of no further use."""
    message = f"the body is larger than {MAX_BODY_BYTES >> 20} MiB"
    return ApiError(413, message, code="request_too_large", close=True)
