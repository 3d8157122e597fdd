"""uvicorn's HTTP/1.1 connection with what it lacks: a deadline and a size for headers, errors in JSON, and word to
every request of a connection, not to the last one only, that the client has gone.

Given to uvicorn by router/process.py. Limits on bodies are router/body.py's.
"""

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from router.errors import bad_request

HEADER_TIMEOUT_S = 10.0
MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 64
_TOO_LARGE = f"the request's headers are larger than {MAX_HEADER_BYTES >> 10} KiB"


class GuardedProtocol(HttpToolsProtocol):
    """A connection between two requests, or with half a header, is closed when its time is up."""

    _timer: asyncio.TimerHandle | None = None
    _is_in_header = False
    _has_body_come = False  # with the last data
    _num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._requests: list[RequestResponseCycle] = []  # since one last came while none was under way
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        for request in self._requests:
            if not request.response_complete:
                request.disconnected = True
                request.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._has_body_come = False
        super().data_received(data)
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
        self.scope["state"]["abort_connection"] = self._abort

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_header:  # what follows a body is no header of the request
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._has_body_come = True
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._num_header_bytes, self._has_body_come = 0, True  # what came with them is no more than they were
        if self.cycle is None or self.cycle.response_complete:
            self._requests = []
        super().on_headers_complete()
        self._requests.append(self.cycle)

    def send_400_response(self, msg: str) -> None:
        self._stop_timer()
        body = bad_request(msg).body()
        lines = (
            STATUS_LINE[400],
            b"content-type: application/json\r\nconnection: close\r\n",
            b"content-length: %d\r\n\r\n" % len(body),
            body,
        )
        self.transport.write(b"".join(lines))
        self.transport.close()

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
