"""The HTTP application: routes, and what holds for all of them: request ids, header checks, errors in one form.

Built by router/process.py. Nothing here or below logs what clients send.
"""

import logging
import re
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.identity import new_request_id
from router.front import pages
from router.front.chat import chat_completions
from router.front.completions import completions
from router.front.errors import ApiError, RequestFailed
from router.front.http_protocol import header_problem
from router.front.last_answer import LastAnswer
from router.front.metrics import RequestMetrics
from router.front.openapi import openapi
from router.front.serving import Serving

logger = logging.getLogger(__name__)

ROUTES = [
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", pages.models),
    Route("/v1/models/{name:path}", pages.model),
    Route("/health", pages.health),
    Route("/ready", pages.ready),
    Route("/status", pages.status),
    Route("/metrics", pages.metrics),
    Route("/openapi.json", openapi),
]


def build_app(serving: Serving, registry: CollectorRegistry, cors_origins: Sequence[str] = ()) -> Starlette:
    """Return the application over these collaborators. cors_origins: whose pages a browser may let call it."""
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(RequestLabel), *_cors(cors_origins)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.serving = serving
    app.state.registry = registry
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Browsers ask first (OPTIONS) whether a page of another origin may send JSON; without an answer it may not."""
    if not origins:
        return []
    answer = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "x-should-retry"),
    )
    return [answer]


class RequestLabel:
    """Gives every answer an x-request-id: the client's own when it is a plain label, otherwise one of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        label = _label(scope)

        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = label
                logger.debug("%s %s %d %s", scope["method"], scope["path"], message["status"], label)
            await send(message)

        problem = header_problem(scope)
        if problem is not None:
            refusal = await _api_error(Request(scope), ApiError(400, problem, close=True))
            await refusal(scope, receive, send_labelled)
            return
        await self._app(scope, receive, send_labelled)


def _label(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", given) else new_request_id()


def render(error: ApiError) -> Response:
    kind = LastAnswer if error.close else Response
    return kind(error.body(), error.status, error.headers, "application/json")


async def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    error.__traceback__ = None  # it would keep what came of a body for as long as the client goes on writing
    if not isinstance(error, RequestFailed):
        _metrics(http).rejected(error.status)
    return render(error)


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path or a method that the path does not have."""
    assert isinstance(error, HTTPException)
    path = http.scope["path"][:200]  # not http.url, which a Host header can bend
    messages = {404: f"there is nothing at {path}", 405: f"{http.method} is not served at this path"}
    ours = ApiError(error.status_code, messages.get(error.status_code, error.detail))
    ours.headers.update(error.headers or {})
    return await _api_error(http, ours)


async def _gone(http: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(http: Request, error: Exception) -> Response:
    """The traceback goes to the log; the client learns no more than that it was not its fault."""
    _metrics(http).rejected(500)
    return render(ApiError(500, "internal error", code="internal_error", should_retry=False))


def _metrics(http: Request) -> RequestMetrics:
    metrics: RequestMetrics = http.app.state.serving.metrics
    return metrics
