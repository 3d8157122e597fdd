"""POST /v1/completions: prompts as text or token ids, answered whole or as a stream."""

import time
from collections.abc import Sequence

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from router.front.choice import Choice, Delta
from router.front.errors import ApiError, no_such_model
from router.front.logprobs import TextOffsets, completion_logprobs
from router.front.prompts import Prompt
from router.front.responder import Call, answer
from router.front.responses import Completion, CompletionChoice, CompletionLogprobs, Usage, UsageField
from router.front.schemas import CompletionBody, parse_body
from router.front.serving import Serving


async def completions(http: Request) -> Response:
    """The endpoint. Raises ApiError for everything that is not 200."""
    serving: Serving = http.app.state.serving
    body = parse_body(await serving.bodies.read(http), CompletionBody)
    check_model(body.model, serving)
    serving.check_open()
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo together with logprobs is not served; ask for one of them", param="echo")
    prompts = await serving.prompts.of_completion(body)
    call = Call(serving, body, prompts)
    generation = call.generation(body.logprobs, "prompt")
    return await answer(call, generation, CompletionForm(call, body), http)


def check_model(name: str | None, serving: Serving) -> None:
    """Raise ApiError 404 for a model that is not the one served; leaving it out is fine."""
    if name not in (None, serving.model_name):
        raise no_such_model(name, serving.model_name)


class CompletionForm:
    """See router.front.responder.AnswerForm. Remembers, per choice, where its text has come to."""

    def __init__(self, call: Call, body: CompletionBody) -> None:
        self._call = call
        self._body = body
        self._created = int(time.time())
        self._offsets = [TextOffsets() for _ in call.prompts]
        self._is_first = [True] * len(call.prompts)

    def whole(self, deltas: Sequence[Delta], choices: Sequence[Choice], usage: Usage) -> Completion:
        both = zip(deltas, choices, strict=True)
        return self._completion([self._choice(index, *pair) for index, pair in enumerate(both)], usage)

    def chunk(self, index: int, delta: Delta, choice: Choice, usage: UsageField) -> Completion:
        return self._completion([self._choice(index, delta, choice)], usage)

    def last_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def _completion(self, choices: list[CompletionChoice], usage: UsageField) -> Completion:
        return Completion(
            id=f"cmpl-{self._call.request_id}",
            created=self._created,
            model=self._call.serving.model_name,
            choices=choices,
            usage=usage,
        )

    def _choice(self, index: int, delta: Delta, choice: Choice) -> CompletionChoice:
        prompt, is_first = self._call.prompts[index], self._is_first[index]
        self._is_first[index] = False
        has_ids = self._body.return_token_ids
        return CompletionChoice(
            index=index,
            text=self._echo(prompt) + delta.text if is_first else delta.text,
            logprobs=self._logprobs(index, delta),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_token_ids=list(prompt.token_ids) if has_ids and is_first else UNSET,
            token_ids=delta.token_ids if has_ids else UNSET,
        )

    def _echo(self, prompt: Prompt) -> str:
        if not self._body.echo:
            return ""
        return self._call.spelling.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _logprobs(self, index: int, delta: Delta) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return completion_logprobs(delta.logprobs, self._call.spelling, self._offsets[index])
