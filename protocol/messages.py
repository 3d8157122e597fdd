"""The control plane: every message between the router and the workers' leaders.

All of them travel over one socket pair per worker, with the router in the middle: prefill and decode exchange only KV
bytes directly. A request's way through these messages:

    router -> decode    Reserve      room for the prompt and its growth, please
    router -> prefill   Prefill      compute this prompt (sent at the same time)
    decode -> prefill   Grant        the room is there; this much of the prompt I already hold   (through the router)
    prefill -> decode   Fetch        send me what you hold of it, so that I need not compute it  (through the router)
    decode -> prefill   Unfetched    that failed; compute it                                     (through the router)
    prefill -> router   PromptLogprobs   if they were asked for, as the prompt is computed
    prefill -> router   Tokens       the first token, straight to the client
    prefill -> decode   Handoff      all frames are on their way; this is what they must add up to (through the router)
    decode -> prefill   Committed    every frame was checked; let go of your blocks               (through the router)
    decode -> router    Tokens       the rest
    router -> either    Abort        forget this attempt, at any stage
    either -> router    Failed       I cannot finish this attempt
"""

from typing import Annotated, Literal

import msgspec

from protocol.identity import Attempt, Epoch
from protocol.layout import Endpoint
from protocol.request import Request

PROTOCOL_VERSION = 4
MAX_COUNTERS = 256
MAX_POSITIONS = 256
"""Of one message: whoever has more to tell sends several, and those that claim more are refused before the rest of them
is parsed."""

RoleName = Literal["prefill", "decode", "colocated"]
WorkerState = Literal["starting", "ready", "draining", "dead"]
FinishReason = Literal["stop", "length"]


class WorkerInfo(msgspec.Struct, frozen=True):
    """One rank of one group, in one life."""

    role: RoleName
    group: int
    rank: int
    tensor_parallel: int
    epoch: Epoch
    pid: int
    node: str


class BlockCounts(msgspec.Struct, frozen=True):
    """What a pool's blocks are doing; free + cached + held = total."""

    total: int = 0
    free: int = 0
    cached: int = 0
    held: int = 0


class Message(msgspec.Struct, frozen=True, tag=True, tag_field="type"):
    """Base of all control messages; the tag on the wire is the class name."""


# --- membership -------------------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """A rank -> router, first message of its life. A leader says where its followers find it."""

    worker: WorkerInfo
    rendezvous: str | None = None


class Welcome(Message, frozen=True):
    """Router -> rank: you are known. Followers learn where their leader waits, as soon as it has joined."""

    rendezvous: str
    leader_epoch: Epoch


class Progress(Message, frozen=True):
    """A rank -> router: what it is doing, in words a person reads ("weights 3 of 9"). Followers go on saying so."""

    doing: str


class Ready(Message, frozen=True):
    """Leader -> router: the whole group is assembled, loaded and warm.

    num_tokens: what one request may hold in this group's pool at most.
    """

    endpoint: Endpoint
    num_tokens: int


class Heartbeat(Message, frozen=True):
    """Leader -> router, a few times a second. steps moves while there is work: liveness is not progress."""

    blocks: BlockCounts
    running: int
    waiting: int
    steps: int
    counters: Annotated[dict[str, int], msgspec.Meta(max_length=MAX_COUNTERS)] = {}


class Ping(Message, frozen=True):
    """Router -> rank: carries nothing. When it cannot be delivered, the rank's connection is gone."""


class Departing(Message, frozen=True):
    """A rank -> router: a signal has asked this process to end, and soon it will, whatever the answer is.

    The router moves what runs in its group and then says Stop or Fence. It is no crash.
    """


class PeerLost(Message, frozen=True):
    """Router -> leader: this group's epoch is over; close every connection to it."""

    epoch: Epoch


class Fence(Message, frozen=True):
    """Router -> rank: your group lost a rank; end this life (Ray starts the next one)."""

    reason: str


class Stop(Message, frozen=True):
    """Router -> rank: nothing more will come; end cleanly."""


# --- a request's way --------------------------------------------------------------------------------------------------


class Reserve(Message, frozen=True):
    """Router -> decode: make room for this request, whose KV will come from source."""

    attempt: Attempt
    request: Request
    source: Endpoint


class Prefill(Message, frozen=True):
    """Router -> prefill: compute this prompt; send its KV to destination once a Grant has come.

    num_held_tokens: a guess at how much of the prompt decode holds; 0 when the grant is not likely to come at once.
    Prefill waits for the grant where that may pay; nothing else rests on it.
    """

    attempt: Attempt
    request: Request
    destination: Endpoint
    num_held_tokens: int = 0


class Grant(Message, frozen=True):
    """Decode -> prefill: blocks are reserved, and the first num_cached_tokens of the prompt are held already."""

    attempt: Attempt
    num_cached_tokens: int


class Fetch(Message, frozen=True):
    """Prefill -> decode: send me the KV of these tokens of the prompt, all of them among those granted as held.

    At most once per attempt, and before its handoff.
    """

    attempt: Attempt
    first_position: int
    num_tokens: int


class Unfetched(Message, frozen=True):
    """Decode -> prefill: what was fetched will not come whole."""

    attempt: Attempt
    reason: str


class Manifest(msgspec.Struct, frozen=True):
    """What the frames of one transfer add up to, over all pairs of ranks."""

    first_position: int
    num_tokens: int
    num_frames: int
    num_bytes: int


class Handoff(Message, frozen=True):
    """Prefill -> decode: the only thing besides bytes that crosses. first_token_id was sampled by prefill."""

    attempt: Attempt
    first_token_id: int
    manifest: Manifest


class Committed(Message, frozen=True):
    """Decode -> prefill: all frames were checked and copied; the prompt's blocks are yours to free."""

    attempt: Attempt


class Abort(Message, frozen=True):
    """Router -> prefill or decode: drop this attempt, whatever its stage. Unknown attempts are fine."""

    attempt: Attempt


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position: of the token drawn, and of the most likely ones, best first."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class PromptLogprobs(Message, frozen=True):
    """Prefill -> router: log probabilities of the prompt's own tokens, from that at first_position on, in order.

    The first token has none, for nothing is before it. They come chunk by chunk, before the first token of the answer,
    and again from the beginning where the request is tried again.
    """

    attempt: Attempt
    first_position: int
    logprobs: Annotated[tuple[TokenLogprobs, ...], msgspec.Meta(max_length=MAX_POSITIONS)]


class TokenUpdate(msgspec.Struct, frozen=True):
    """One new token of one attempt. index counts the request's output tokens from 0, so a gap or a double shows.

    num_cached_tokens: prompt tokens that prefill found in its prefix cache; set on an answer's first token only, so
    that an answer which goes on elsewhere counts them once.
    """

    attempt: Attempt
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


class Tokens(Message, frozen=True):
    """Worker -> router: what one step brought, for all requests at once; where these are very many, in several."""

    updates: Annotated[tuple[TokenUpdate, ...], msgspec.Meta(max_length=MAX_POSITIONS)]


class Failed(Message, frozen=True):
    """Worker -> router: this attempt is over here. code is from a closed set (see protocol.errors)."""

    attempt: Attempt
    code: str
    message: str


AnyMessage = (
    Join | Welcome | Progress | Ready | Heartbeat | Ping | Departing | PeerLost | Fence | Stop
    | Reserve | Prefill | Grant | Fetch | Unfetched | Handoff | Committed | Abort | PromptLogprobs | Tokens | Failed
)  # fmt: skip


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What is on the wire: a version, both ends' epochs (0: not yet known), one message.

    An array whose first element is the version, in every version: so both ends can say which ones differ.
    """

    version: int
    sender_epoch: Epoch
    receiver_epoch: Epoch
    message: AnyMessage
