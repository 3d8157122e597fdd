"""A request while one worker works on it: its tokens so far, its blocks, how much of it is computed.

Made and owned by a role; never leaves its worker. A Chunk is the part of it that goes into the next forward pass, which
may be launched before the last one is over: then its token is not known yet, only that there will be one.
"""

from dataclasses import dataclass, field

from engine.block_pool import Hold
from engine.prefix_hash import HashChain
from protocol.identity import Attempt
from protocol.messages import FinishReason
from protocol.request import Request


@dataclass(eq=False)
class Sequence:
    """Tokens [0, num_computed) of token_ids have their KV in hold's blocks.

    num_launched: how far the steps under way reach; num_drawing: how many tokens they are drawing. is_leaving: its KV
    goes to another group while the rest of it is computed.
    """

    attempt: Attempt
    request: Request
    hold: Hold
    chain: HashChain
    num_computed: int
    token_ids: list[int] = field(default_factory=list)
    num_launched: int = field(init=False)
    num_drawing: int = field(init=False, default=0)
    is_leaving: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.known_token_ids, *self.token_ids]
        self.num_launched = self.num_computed

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """How many tokens this worker was given; those behind them were drawn here or by prefill."""
        return self.request.num_known_tokens

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

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, those that are being drawn included."""
        return len(self.token_ids) + self.num_drawing

    @property
    def is_drawn(self) -> bool:
        """Whether the steps under way draw the last token that this request may have."""
        return self.num_tokens - self.num_prompt_tokens >= self.request.sampling.max_tokens

    def next_chunk(self, max_tokens: int, wants_all: bool = False) -> "Chunk":
        """Return the next part to compute, at most max_tokens long.

        wants_all: logits of every position are wanted, not only of the one behind which a token is drawn.
        """
        end = min(self.num_launched + max_tokens, self.num_tokens)
        assert end > self.num_launched, "there is nothing to compute"
        first_wanted = self.num_launched if wants_all else max(self.num_launched, self.num_tokens - 1)
        return Chunk(self, self.num_launched, end, range(first_wanted, end), is_drawn=end == self.num_tokens)

    def skip_to(self, position: int) -> None:
        """KV up to position has come from elsewhere. No step of this sequence may be under way."""
        assert self.num_computed == self.num_launched <= position
        self.num_computed = self.num_launched = position

    def launch(self, chunk: "Chunk") -> None:
        """A step with this chunk is under way."""
        self.num_launched = chunk.end
        self.num_drawing += chunk.is_drawn

    def land(self, chunk: "Chunk") -> None:
        """That step is over: KV is there as far as the chunk reached. Whoever takes the token appends it."""
        self.num_computed = chunk.end
        self.num_drawing -= chunk.is_drawn


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, end) of a sequence.

    wanted: the positions whose logits are wanted, the last of the chunk. is_drawn: a token is drawn behind the last of
    them, for nothing is known there; behind the others the sequence says what follows.
    """

    sequence: Sequence
    start: int
    end: int
    wanted: range
    is_drawn: bool

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def is_carried(self) -> bool:
        """Whether its token is one that the step before is still drawing."""
        return self.end > len(self.sequence.token_ids)
