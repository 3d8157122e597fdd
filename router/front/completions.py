"""POST /v1/completions: prompts as text or token ids, answered whole or as a stream."""

from collections.abc import Sequence

from msgspec import UNSET
from starlette.requests import Request

from router.front.call import Call
from router.front.choice import Choice, Delta
from router.front.errors import bad_request
from router.front.logprobs import TextOffsets, completion_logprobs
from router.front.requests import Prompt
from router.front.responses import Completion, CompletionChoice, CompletionLogprobs, UsageField
from router.front.schemas import CompletionBody
from router.front.serving import Serving


async def completions(http: Request) -> "CompletionCall":
    """The endpoint. Raises ApiError for everything that is not 200."""
    serving: Serving = http.app.state.serving
    body = await serving.checked_body(http, CompletionBody)
    if body.echo and body.logprobs is not None:
        raise bad_request("echo together with logprobs is not served; ask for one of them", "echo")
    return CompletionCall(serving, body, await serving.requests.completion_prompts(body))


class CompletionCall(Call[CompletionBody]):
    """Remembers, per choice, where its text has come to."""

    def __init__(self, serving: Serving, body: CompletionBody, prompts: Sequence[Prompt]) -> None:
        super().__init__(serving, body, prompts)
        self._offsets = [TextOffsets() for _ in prompts]

    def written(self, news: Sequence[tuple[Choice, Delta]], usage: UsageField) -> Completion:
        return Completion(
            id=f"cmpl-{self.request_id}",
            created=self.created,
            model=self.serving.model_name,
            choices=[self._written(choice, delta) for choice, delta in news],
            usage=usage,
        )

    def _written(self, choice: Choice, delta: Delta) -> CompletionChoice:
        has_ids = self.body.return_token_ids
        return CompletionChoice(
            index=choice.index,
            text=self._echo(choice.prompt) + delta.text if delta.is_first else delta.text,
            logprobs=self._logprobs(choice, delta),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_token_ids=list(choice.prompt.token_ids) if has_ids and delta.is_first else UNSET,
            token_ids=delta.token_ids if has_ids else UNSET,
        )

    def _echo(self, prompt: Prompt) -> str:
        if not self.body.echo:
            return ""
        return self.spelling.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _logprobs(self, choice: Choice, delta: Delta) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(delta.logprobs, self.spelling, self._offsets[choice.index])
