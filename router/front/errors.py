"""Errors as clients see them: OpenAI's JSON form, a status, and what a client's retry logic reads.

Raised anywhere in the HTTP half of the router, rendered by app.py before the first byte of a stream and by
call.py after it.
"""

import msgspec

from router.control.events import EndCode, Outcome

RETRY_AFTER_S = 1


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is inside {"error": ...}."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


class ApiError(Exception):
    """An answer other than 200. should_retry None leaves it to the client's own rules; close ends the connection."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        should_retry: bool | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.close = close
        self.detail = ErrorDetail(message, _TYPES.get(status, _type_of_class(status)), param, code)
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)
        if should_retry is not None:
            self.headers["x-should-retry"] = str(should_retry).lower()
        if close:
            self.headers["connection"] = "close"

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))


class RequestFailed(ApiError):
    """The end of a request that was under way, which is counted by its outcome and not as a refusal."""


_TYPES = {404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}


def _type_of_class(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def bad_request(message: str, param: str | None = None, code: str | None = None, *, close: bool = False) -> ApiError:
    """The client must change its request; sending it again cannot help."""
    return ApiError(400, message, param=param, code=code, close=close)


def too_long(num_prompt_tokens: int, num_tokens: int, param: str) -> ApiError:
    """Clients know it by its code, or by the words "maximum context length is"."""
    what = f"The prompt has {num_prompt_tokens}; it can have at most {num_tokens - 1}."
    return bad_request(f"{_CONTEXT.format(num_tokens)} {what}", param, "context_length_exceeded")


def text_too_long(num_characters: int, num_tokens: int, param: str) -> ApiError:
    what = f"A text of {num_characters} characters cannot fit into it."
    return bad_request(f"{_CONTEXT.format(num_tokens)} {what}", param, "context_length_exceeded")


_CONTEXT = "This model's maximum context length is {} tokens, prompt and output together."


def no_such_model(name: str, served: str) -> ApiError:
    message = f"the model {name[:200]!r} does not exist here; served is {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def unavailable(reason: str, code: str = "no_worker") -> ApiError:
    """Nobody can serve this now, but somebody may soon."""
    return ApiError(503, reason, code=code, retry_after_s=RETRY_AFTER_S, should_retry=True)


def overloaded(reason: str, *, close: bool = False) -> ApiError:
    """There is too much of something at this moment."""
    return ApiError(429, reason, code="overloaded", retry_after_s=RETRY_AFTER_S, should_retry=True, close=close)


# Status, and whether the same request may well succeed next time. What another attempt can mend was attempted already.
_STATUSES: dict[EndCode, tuple[int, bool]] = {
    "worker_lost": (503, False),
    "worker_leaving": (503, False),
    "quarantined": (500, False),
    "transfer_failed": (503, True),
    "shutting_down": (503, True),
    "out_of_memory": (503, True),
    "kv_cache_too_small": (500, False),
    "model_output_invalid": (500, False),
    "internal_error": (500, False),
    "deadline_exceeded": (504, False),
}


def from_outcome(outcome: Outcome) -> RequestFailed:
    """Return the error for a request that failed."""
    status, should_retry = _STATUSES.get(outcome.code, (500, False))
    return RequestFailed(
        status,
        outcome.message or "the request failed",
        code=outcome.code,
        retry_after_s=RETRY_AFTER_S if should_retry else None,
        should_retry=should_retry,
    )
