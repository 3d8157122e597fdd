"""Reads an HTTP request's body within a limit and a deadline, whatever its headers claim. For the POST endpoints."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from router.front.errors import ApiError

MAX_BODY_BYTES = 4 << 20
BODY_TIMEOUT_S = 30.0


async def read_body(request: Request) -> bytes:
    """Return the body. Raise ApiError 413 or 408, or ClientDisconnect when the client has gone."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read(request)
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        raise ApiError(408, message, code="request_timeout", close=True) from None


async def _read(request: Request) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    return bytes(body)


def _too_large() -> ApiError:
    """The rest of the body will not be read, so the connection is of no further use."""
    message = f"the body is larger than {MAX_BODY_BYTES >> 20} MiB"
    return ApiError(413, message, code="request_too_large", close=True)
