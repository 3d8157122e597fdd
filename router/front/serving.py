"""What the HTTP endpoints stand on, built once by router/process.py and handed to each through the app's state."""

from dataclasses import dataclass

from starlette.requests import Request

from router.control.plane import ControlPlane
from router.front.body import BodyReader
from router.front.errors import no_such_model, overloaded, unavailable
from router.front.metrics import RequestMetrics
from router.front.requests import RequestMaker
from router.front.schemas import BodyT, parse_body
from router.front.text import ModelText
from router.front.work_pool import WorkPool

MAX_REQUESTS = 4096
"""Under way at once. It bounds memory, not yet waiting: that needs an estimate of when queues will be served."""


@dataclass
class Serving:
    """The model as clients see it, and the way to the workers. Only is_draining ever changes."""

    control: ControlPlane
    metrics: RequestMetrics
    text: ModelText
    bodies: BodyReader
    requests: RequestMaker
    model_name: str
    max_context: int
    timeout_s: float
    created: int
    metrics_writing: WorkPool
    is_draining: bool = False

    def close(self) -> None:
        """Begin no more work in threads."""
        self.text.close()
        self.metrics_writing.close()

    @property
    def why_not_ready(self) -> str | None:
        """None when answers get through every group, otherwise why not; requests are taken by those that serve."""
        return "the server is shutting down" if self.is_draining else self.control.controller.why_not_ready

    async def checked_body(self, http: Request, kind: type[BodyT]) -> BodyT:
        """Return the body of a call that may begin. Raise ApiError, or ClientDisconnect when the client has gone."""
        body = parse_body(await self.bodies.read(http), kind)
        if body.model not in (None, self.model_name):
            raise no_such_model(body.model, self.model_name)
        self.check_open()
        return body

    def check_open(self) -> None:
        """Raise ApiError 503 while new requests are not taken, 429 while there are too many."""
        if self.is_draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if len(self.control.controller.attempts) >= MAX_REQUESTS:
            raise overloaded(f"{MAX_REQUESTS} requests are under way already")
