"""A request while one worker works on it: its tokens so far, its blocks, how much of it is computed.

Made and owned by a role; never leaves its worker. A Chunk is the part of it that goes into the next forward pass.
"""

from dataclasses import dataclass, field

from engine.block_pool import Hold
from engine.prefix_hash import HashChain
from protocol.identity import Attempt
from protocol.messages import FinishReason
from protocol.request import Request


@dataclass(eq=False)
class Sequence:
    """Tokens [0, num_computed) of token_ids have their KV in hold's blocks."""

    attempt: Attempt
    request: Request
    hold: Hold
    chain: HashChain
    num_computed: int
    token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *self.token_ids]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the last token ends this request, or None when more tokens follow."""
        sampling = self.request.sampling
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if num_output and num_output >= sampling.min_tokens and self.token_ids[-1] in sampling.ending_token_ids:
            return "stop"
        return "length" if num_output >= sampling.max_tokens else None

    @property
    def block_names(self) -> list[bytes]:
        """Names of the blocks that are full and computed."""
        return self.chain.of(self.token_ids, self.num_computed)

    def next_chunk(self, max_tokens: int) -> "Chunk":
        """Return the next part to compute, at most max_tokens long."""
        return Chunk(self, min(max_tokens, len(self.token_ids) - self.num_computed))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [num_computed, num_computed + num_tokens) of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def end(self) -> int:
        return self.sequence.num_computed + self.num_tokens

    @property
    def is_sampled(self) -> bool:
        """Whether its last token is the sequence's last, so that the next one is drawn from its logits."""
        return self.end == len(self.sequence.token_ids)
