"""POST /v1/chat/completions: messages through the model's chat template, answered whole or as a stream."""

import time
from collections.abc import Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from router.front.choice import Choice, Delta
from router.front.completions import check_model
from router.front.errors import bad_request
from router.front.logprobs import chat_logprobs
from router.front.responder import Call, answer
from router.front.responses import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
    UsageField,
)
from router.front.schemas import ChatBody, parse_body
from router.front.serving import Serving


async def chat_completions(http: Request) -> Response:
    """The endpoint. Raises ApiError for everything that is not 200."""
    serving: Serving = http.app.state.serving
    body = parse_body(await serving.bodies.read(http), ChatBody)
    check_model(body.model, serving)
    serving.check_open()
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    call = Call(serving, body, [await serving.prompts.of_chat(body)])
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    generation = call.generation(num_logprobs, "messages")
    return await answer(call, generation, ChatForm(call, body), http)


class ChatForm:
    """See router.front.responder.AnswerForm. The first chunk carries the role beside its text."""

    def __init__(self, call: Call, body: ChatBody) -> None:
        self._call = call
        self._body = body
        self._created = int(time.time())
        self._prompt_token_ids = list(call.prompts[0].token_ids) if body.return_token_ids else UNSET
        self._is_first = True

    def whole(self, deltas: Sequence[Delta], choices: Sequence[Choice], usage: Usage) -> ChatCompletion:
        message = AssistantMessage("assistant", deltas[0].text)
        return self._completion("chat.completion", deltas[0], choices[0], usage, message)

    def chunk(self, index: int, delta: Delta, choice: Choice, usage: UsageField) -> ChatCompletion:
        return self._completion("chat.completion.chunk", delta, choice, usage)

    def last_chunk(self, usage: Usage) -> ChatCompletion:
        return self._answer("chat.completion.chunk", [], usage)

    def _completion(
        self, kind: str, delta: Delta, choice: Choice, usage: UsageField, message: AssistantMessage | None = None
    ) -> ChatCompletion:
        prompt_token_ids = self._prompt_token_ids if self._is_first else UNSET
        role = "assistant" if self._is_first else UNSET
        self._is_first = False
        written = ChatChoice(
            index=0,
            message=message or UNSET,
            delta=ChatDelta(delta.text, role) if message is None else UNSET,
            logprobs=self._logprobs(delta),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_token_ids=prompt_token_ids,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )
        return self._answer(kind, [written], usage, prompt_token_ids)

    def _answer(
        self, kind: str, choices: list[ChatChoice], usage: UsageField, prompt_ids: list[int] | UnsetType = UNSET
    ) -> ChatCompletion:
        return ChatCompletion(
            id=f"chatcmpl-{self._call.request_id}",
            object=kind,
            created=self._created,
            model=self._call.serving.model_name,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_ids,
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return chat_logprobs(delta.logprobs, self._call.spelling) if self._body.logprobs else None
