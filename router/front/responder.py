"""Answers one completion call, whole or streamed: what the text and the chat endpoint have in common.

Each of them describes its own form of a choice in an AnswerForm; this file runs the generation and adds up the usage.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from protocol.identity import new_request_id
from protocol.request import Request, SamplingParams
from router.front.choice import Choice, Delta
from router.front.errors import ApiError
from router.front.event_stream import EventStream, frame
from router.front.generation import ClientGone, Generation
from router.front.logprobs import Spelling
from router.front.prompts import Prompt
from router.front.responses import CachedTokens, Usage, UsageField
from router.front.sampling import sampling_params, stop_strings
from router.front.schemas import SamplingBody
from router.front.serving import Serving


class AnswerForm(Protocol):
    """How one endpoint writes what came of its choices."""

    def whole(self, deltas: Sequence[Delta], choices: Sequence[Choice], usage: Usage) -> msgspec.Struct:
        """Return the answer that is not streamed."""

    def chunk(self, index: int, delta: Delta, choice: Choice, usage: UsageField) -> msgspec.Struct:
        """Return one chunk of a stream; called for every delta in order."""

    def last_chunk(self, usage: Usage) -> msgspec.Struct:
        """Return the chunk without choices that carries the usage."""


class Call:
    """One checked HTTP call: its prompts, their parameters, and the generation that serves them."""

    def __init__(self, serving: Serving, body: SamplingBody, prompts: Sequence[Prompt]) -> None:
        self.serving = serving
        self.body = body
        self.prompts = prompts
        self.request_id = new_request_id()
        self.spelling = Spelling(
            serving.text, body.skip_special_tokens is not False, bool(body.return_tokens_as_token_ids)
        )

    def generation(self, num_logprobs: int | None, param: str) -> Generation:
        """Return the call's generation, not yet started."""
        stops = stop_strings(self.body)
        requests, choices = [], []
        for index, prompt in enumerate(self.prompts):
            params = self._params(prompt, num_logprobs, param)
            requests.append(self._request(index, prompt, params))
            before = () if prompt.begins_text else prompt.token_ids
            detokenizer = self.serving.text.detokenizer(before, self.spelling.skips_special)
            own_ends = params.chosen_stop_token_ids
            choices.append(Choice(detokenizer, stops, params.min_tokens, own_ends, self.body.shows_stop))
        serving = self.serving
        return Generation(serving.control, serving.metrics, requests, choices, serving.timeout_s)

    def _params(self, prompt: Prompt, num_logprobs: int | None, param: str) -> SamplingParams:
        """What was asked for is checked before it is cut to what fits; by itself it is the rest of the context."""
        serving = self.serving
        room = serving.room_for(prompt, param)
        asked = room if self.body.most_tokens is None else self.body.most_tokens
        facts = serving.eos_token_ids, serving.vocab_size, serving.sampling_defaults
        params = sampling_params(self.body, asked, num_logprobs, *facts)
        return msgspec.structs.replace(params, max_tokens=min(asked, room), min_tokens=min(params.min_tokens, room))

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        request_id = self.request_id if len(self.prompts) == 1 else f"{self.request_id}-{index}"
        return Request(request_id, prompt.token_ids, params, self.body.cache_salt or "")

    def usage(self, choices: Sequence[Choice]) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.num_tokens for choice in choices)
        cached = CachedTokens(sum(choice.num_cached_tokens for choice in choices))
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, cached)


async def answer(call: Call, generation: Generation, form: AnswerForm, http: HttpRequest) -> Response:
    """Run generation and return what the client asked for: one JSON body, or a stream of events."""
    generation.watch(http.receive)
    if call.body.stream:
        return EventStream(generation, _StreamWriter(call, generation, form))
    totals = [Delta() for _ in generation.choices]
    try:
        async with generation:
            async for batch in generation.deltas():
                for index, delta in batch.items():
                    totals[index].extend(delta)
    except ClientGone:
        return Response(status_code=499)
    whole = form.whole(totals, generation.choices, call.usage(generation.choices))
    return Response(msgspec.json.encode(whole), media_type="application/json")


class _StreamWriter:
    """Frames of one streamed call."""

    def __init__(self, call: Call, generation: Generation, form: AnswerForm) -> None:
        options = call.body.stream_options
        self._call, self._generation, self._form = call, generation, form
        self._has_last_usage = bool(options and options.include_usage)
        self._no_usage = None if self._has_last_usage else UNSET
        self._has_every_usage = bool(options and options.continuous_usage_stats)

    def frames(self, batch: dict[int, Delta]) -> bytes:
        choices = self._generation.choices
        usage = self._call.usage(choices) if self._has_every_usage else self._no_usage
        return b"".join(
            frame(msgspec.json.encode(self._form.chunk(index, delta, choices[index], usage)))
            for index, delta in batch.items()
        )

    def error(self, error: ApiError) -> bytes:
        return frame(error.body())

    def end(self) -> bytes:
        done = frame(b"[DONE]")
        if not self._has_last_usage:
            return done
        usage = self._call.usage(self._generation.choices)
        return frame(msgspec.json.encode(self._form.last_chunk(usage))) + done
