"""A request as it crosses the wire: token ids and sampling parameters, never a text.

Built by the router from an HTTP body, read by both roles. All checks that need no model are here; those that need the
vocabulary or the context length are the router's.
"""

import math

import msgspec

MAX_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is drawn; the fields mean what they mean in the OpenAI and vLLM interfaces.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch those filters off. num_logprobs and num_prompt_logprobs
    None: none asked, of the answer and of the prompt.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_penalized(self) -> bool:
        """Whether a token's logit depends on the text so far."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the request once min_tokens have been drawn."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids + self.eos_token_ids

    @property
    def chosen_stop_token_ids(self) -> frozenset[int]:
        """Tokens that end the request because it says so, and would not end it otherwise."""
        return frozenset(self.stop_token_ids).difference(() if self.ignore_eos else self.eos_token_ids)

    def validate(self, vocab_size: int) -> None:
        """Raise ValueError, naming the parameter and its bounds, for a value no sampler could honour."""
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value}")
        if self.top_p == 0:
            raise ValueError("top_p must be greater than 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        for name, number in (("logprobs", self.num_logprobs), ("prompt_logprobs", self.num_prompt_logprobs)):
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise ValueError(f"{name} must be between 0 and {MAX_LOGPROBS}, not {number}")
        self._validate_token_ids(vocab_size)

    def _validate_token_ids(self, vocab_size: int) -> None:
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            outside = next((i for i in ids if not 0 <= i < vocab_size), None)
            if outside is not None:
                raise ValueError(f"{name} holds token id {outside}; the vocabulary has ids 0 to {vocab_size - 1}")
        for token_id, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token_id} must be between -100 and 100, not {bias}")


_BOUNDS = (
    ("max_tokens", 1, 1 << 31),
    ("temperature", 0.0, 2.0),
    ("top_k", 0, 1 << 31),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-6, 10.0),  # logits are divided by it, in float32
    ("min_tokens", 0, 1 << 31),
)


class Request(msgspec.Struct, frozen=True):
    """What prefill and decode are asked to do. Each side builds its own Sequence from it.

    salt separates prefix caches: blocks are shared only between requests of equal salt.
    generated_token_ids: what earlier attempts have drawn of the answer. Prefill computes it like a prompt, and the
    answer goes on behind it: draws, penalties, min_tokens and max_tokens count from the end of the client's prompt.
    Its deadline is not here: the router alone keeps it, and tells workers with an Abort that it has passed.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    salt: str = ""
    generated_token_ids: tuple[int, ...] = ()

    @property
    def known_token_ids(self) -> tuple[int, ...]:
        """The prompt, and what earlier attempts have drawn: all that prefill computes."""
        return self.prompt_token_ids + self.generated_token_ids

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.generated_token_ids)

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether log probabilities of the prompt are wanted; an answer that has begun has brought them."""
        return self.sampling.num_prompt_logprobs is not None and not self.generated_token_ids

    @property
    def max_num_tokens(self) -> int:
        """Upper bound of prompt plus output, which decode reserves blocks for."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens
