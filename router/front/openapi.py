"""/openapi.json, generated from the types that bodies are decoded into and encoded from."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from router.front.errors import ErrorBody
from router.front.pages import Health, Status, json
from router.front.responses import ChatCompletion, Completion, ModelCard, ModelList
from router.front.schemas import ChatBody, CompletionBody

_POSTS: dict[str, tuple[type, type]] = {
    "/v1/completions": (CompletionBody, Completion),
    "/v1/chat/completions": (ChatBody, ChatCompletion),
}
_GETS: dict[str, type] = {"/v1/models": ModelList, "/health": Health, "/ready": Health, "/status": Status}
_POST_ERRORS = ("400", "404", "408", "413", "415", "429", "500", "503", "504")


def build_openapi() -> dict[str, Any]:
    """Return the document as builtins."""
    types = [kind for pair in _POSTS.values() for kind in pair] + [*_GETS.values(), ModelCard, ErrorBody]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"post": _post(*kinds)} for path, kinds in _POSTS.items()}
    paths |= {path: {"get": _get(path, kind)} for path, kind in _GETS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }


async def openapi(http: Request) -> Response:
    return json(build_openapi())


def _post(body: type, answer: type) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": _content(answer, "the completion, or a stream of its chunks")}
    answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "requestBody": {"required": True, **_content(body)},
        "responses": answers | {status: _content(ErrorBody, "an error") for status in _POST_ERRORS},
    }


def _get(path: str, answer: type) -> dict[str, Any]:
    errors = {"503": _content(ErrorBody, "no worker is ready")} if path == "/ready" else {}
    return {"responses": {"200": _content(answer, "the answer"), **errors}}


def _content(kind: type, description: str | None = None) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    described = {} if description is None else {"description": description}
    return {**described, "content": {"application/json": {"schema": schema}}}
