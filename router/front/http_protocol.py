"""uvicorn's HTTP/1.1 connection with what it lacks: a deadline and a size for headers, errors in JSON, an ear for what
follows an offer of another protocol, and word to every request of a connection, not to the last one only, that the
client has gone.

Given to uvicorn by router/process.py. Limits on bodies are body.py's.
"""

import asyncio
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.front.errors import ApiError, bad_request, overloaded
from router.front.quota import Quota, owner_of

HEADER_TIMEOUT_S = 10.0
MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 64
_TOO_LARGE = f"the request's headers are larger than {MAX_HEADER_BYTES >> 10} KiB"


class GuardedProtocol(HttpToolsProtocol):
    """A connection between two requests, or with half a header, is closed when its time is up."""

    _owner: str | None = None
    _timer: asyncio.TimerHandle | None = None
    _is_in_header = False
    _has_body_come = False  # with the last data
    _num_header_bytes = 0

    def __init__(self, connections: Quota, *arguments: Any, **named: Any) -> None:
        """connections: how many there may be; the rest is uvicorn's."""
        super().__init__(*arguments, **named)
        self._quota = connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._requests: list[RequestResponseCycle] = []  # since one last came while none was under way
        owner = owner_of(self.client)
        if not self._quota.take(owner, 1):
            self._refuse(overloaded("too many connections"))
            return
        self._owner = owner
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._owner is not None:
            self._quota.give_back(self._owner, 1)
        self._stop_timer()
        super().connection_lost(exc)
        for request in self._requests:
            if not request.response_complete:
                request.disconnected = True
                request.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._has_body_come = False
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except (HttpParserError, HttpParserUpgrade):  # the latter when it is not for us to pass over: CONNECT
            self.send_400_response("Invalid HTTP request received.")
        if self.transport.is_closing():
            return
        if self._is_in_header:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES:
                self.send_400_response(_TOO_LARGE)
            return
        if self._timer is None and self.cycle.response_complete:
            # No request yet, but uvicorn has just stopped its own timer: an unread body's rest, or empty lines.
            self._start_timer()
        if self.cycle.more_body:
            self._count_around_body(len(data))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_header()
        self.scope["state"] |= {"abort_connection": self._abort, "flow": self.flow}

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_header:  # what follows a body is no header of the request
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._has_body_come = True
        super().on_body(body)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # _parse has it begin again
        self._stop_timer()
        self._num_header_bytes, self._has_body_come = 0, True  # what came with them is no more than they were
        if self.cycle is None or self.cycle.response_complete:
            self._requests = []
        super().on_headers_complete()
        self._requests.append(self.cycle)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(bad_request(msg))

    def _refuse(self, error: ApiError) -> None:
        """Say so and close, without having a request to answer."""
        self._stop_timer()
        body = error.body()
        headers = {"content-type": "application/json", "connection": "close", "content-length": len(body)}
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers | error.headers).items())
        self.transport.write(STATUS_LINE[error.status] + lines.encode() + b"\r\n" + body)
        self.transport.close()

    def _parse(self, data: bytes) -> None:
        """Pass over offers of other protocols: a server may (RFC 9110, 7.8), and Java's clients offer HTTP/2 at first.

        The parser takes all that follows such headers, the body included, for the other protocol.
        """
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
            self._begin_again()

    def _begin_again(self) -> None:
        """Let a new parser see the request's headers without the offer."""
        first_line = self.parser.get_method(), self.url, b"HTTP/" + self.parser.get_http_version().encode()
        headers = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"\r\n".join([b" ".join(first_line), *headers, b"", b""]))

    def _count_around_body(self, num_bytes: int) -> None:
        """Chunks may bear words of their own, and headers may follow the last: the parser would keep them all."""
        self._num_header_bytes = 0 if self._has_body_come else self._num_header_bytes + num_bytes
        if self._num_header_bytes > MAX_HEADER_BYTES:
            self._abort()

    def _await_header(self) -> None:
        self._stop_timer()
        self._is_in_header, self._num_header_bytes = True, 0
        self._start_timer()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._abort)

    def _stop_timer(self) -> None:
        self._is_in_header = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        self.transport.abort()


def header_problem(scope: Scope) -> str | None:
    """Say why these headers cannot be trusted; two lengths of one body are how requests are smuggled."""
    names = [name for name, _ in scope["headers"]]
    if len(names) > MAX_HEADERS:
        return f"a request may have at most {MAX_HEADERS} headers, not {len(names)}"
    if _num_bytes(scope) > MAX_HEADER_BYTES:  # what comes at once is not counted by its connection
        return _TOO_LARGE
    if scope["http_version"] == "1.1" and names.count(b"host") != 1:
        return "a request must have exactly one Host header"
    if names.count(b"content-length") + (b"transfer-encoding" in names) > 1:
        return "a request must have one Content-Length or Transfer-Encoding, not several"
    return None


def _num_bytes(scope: Scope) -> int:
    in_headers = sum(len(name) + len(value) for name, value in scope["headers"])
    return len(scope["raw_path"]) + len(scope["query_string"]) + in_headers
