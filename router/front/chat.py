"""POST /v1/chat/completions: messages through the model's chat template, answered whole or as a stream."""

from collections.abc import Sequence

from msgspec import UNSET
from starlette.requests import Request

from router.front.call import Call
from router.front.choice import Choice, Delta
from router.front.errors import bad_request
from router.front.logprobs import chat_logprobs
from router.front.responses import AssistantMessage, ChatChoice, ChatCompletion, ChatDelta, UsageField
from router.front.schemas import ChatBody
from router.front.serving import Serving


async def chat_completions(http: Request) -> "ChatCall":
    """The endpoint. Raises ApiError for everything that is not 200."""
    serving: Serving = http.app.state.serving
    body = await serving.checked_body(http, ChatBody)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    return ChatCall(serving, body, [await serving.requests.chat_prompt(body)])


class ChatCall(Call[ChatBody]):
    """It has one choice, whose first chunk carries the role beside its text."""

    def written(self, news: Sequence[tuple[Choice, Delta]], usage: UsageField) -> ChatCompletion:
        written = [self._written(choice, delta) for choice, delta in news]
        return ChatCompletion(
            id=f"chatcmpl-{self.request_id}",
            object="chat.completion.chunk" if self.body.stream else "chat.completion",
            created=self.created,
            model=self.serving.model_name,
            choices=written,
            usage=usage,
            prompt_token_ids=written[0].prompt_token_ids if written else UNSET,
        )

    def _written(self, choice: Choice, delta: Delta) -> ChatChoice:
        body = self.body
        chunk = ChatDelta(delta.text, "assistant" if delta.is_first else UNSET)
        return ChatChoice(
            index=choice.index,
            message=UNSET if body.stream else AssistantMessage("assistant", delta.text),
            delta=chunk if body.stream else UNSET,
            logprobs=chat_logprobs(delta.logprobs, self.spelling) if body.logprobs else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_token_ids=list(choice.prompt.token_ids) if body.return_token_ids and delta.is_first else UNSET,
            token_ids=delta.token_ids if body.return_token_ids else UNSET,
        )
