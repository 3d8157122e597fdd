"""What the HTTP endpoints stand on, built once by router/process.py and handed to each through the app's state."""

from dataclasses import dataclass

from protocol.generation_config import SamplingDefaults
from router.control.dispatch import NoPair, PromptTooLong
from router.control.plane import ControlPlane
from router.front.body import BodyReader
from router.front.errors import overloaded, too_long, unavailable
from router.front.metrics import RequestMetrics
from router.front.prompts import Prompt, PromptMaker
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
    model_name: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    timeout_s: float
    created: int
    sampling_defaults: SamplingDefaults
    metrics_writing: WorkPool
    is_draining: bool = False

    def close(self) -> None:
        """Begin no more work in threads."""
        self.text.close()
        self.metrics_writing.close()

    @property
    def prompts(self) -> PromptMaker:
        return PromptMaker(self.text, self.vocab_size, self.max_context)

    @property
    def why_not_ready(self) -> str | None:
        """None when answers get through every group, otherwise why not; requests are taken by those that serve."""
        return "the server is shutting down" if self.is_draining else self.control.controller.why_not_ready

    def check_open(self) -> None:
        """Raise ApiError 503 while new requests are not taken, 429 while there are too many."""
        if self.is_draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if len(self.control.controller.attempts) >= MAX_REQUESTS:
            raise overloaded(f"{MAX_REQUESTS} requests are under way already")

    def room_for(self, prompt: Prompt, param: str) -> int:
        """Return how many tokens may follow prompt: at least one. Raise ApiError 400 or 503."""
        num_prompt_tokens = len(prompt.token_ids)
        if num_prompt_tokens + 1 > self.max_context:
            raise too_long(num_prompt_tokens, self.max_context, param)
        try:
            capacity = self.control.controller.dispatcher.capacity(num_prompt_tokens)
        except NoPair as error:
            raise unavailable(str(error)) from None
        except PromptTooLong as error:
            raise too_long(num_prompt_tokens, error.num_tokens, param) from None
        return min(self.max_context, capacity) - num_prompt_tokens
