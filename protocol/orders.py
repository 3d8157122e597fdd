"""Inside one group: what the leader orders all its ranks to do, and what the ranks report back.

Every rank, the leader's own included, carries out the same orders in the same sequence. That is what keeps the
two-sided calls of tensor parallelism matched, and blocks safe: an order to send blocks comes after the step that
filled them and before any step that reuses them.
"""

from array import array
from collections.abc import Iterable

import msgspec

from protocol.errors import UNPARSABLE, WireError
from protocol.identity import Attempt, Epoch
from protocol.layout import Endpoint

BLOCK_ID_BYTES = 4


def block_table(block_ids: Iterable[int]) -> bytes:
    """Return a block table as batches carry it, int32 [num_blocks] in the processor's order of bytes.

    It may be cut and is read as it is: a step of many long contexts has a hundred thousand block ids.
    """
    return array("i", block_ids).tobytes()


class CarriedToken(msgspec.Struct, frozen=True, array_like=True):
    """The batch's token at index is not known yet: it is what the batch before draws in this row."""

    index: int
    row: int


class Leaving(msgspec.Struct, frozen=True, array_like=True):
    """KV of this attempt leaves layer by layer while a batch computes its positions up to num_computed."""

    attempt: Attempt
    num_computed: int


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """One forward pass over num_sequences chunks, laid out one after another; single-token chunks come first.

    A chunk of sequence i is its tokens [context_lens[i] - query_lens[i], context_lens[i]); their KV goes to the slots
    that block_tables[i] names. Logits are wanted for the tokens in sampled. Tokens that are not known yet, because the
    batch before is still drawing them, are 0 in token_ids and named in carried.
    """

    token_ids: tuple[int, ...]  # [num_tokens]
    query_lens: tuple[int, ...]  # [num_sequences]
    context_lens: tuple[int, ...]  # [num_sequences], the chunk included
    block_tables: tuple[bytes, ...]  # [num_sequences], each a block_table of that sequence
    sampled: tuple[int, ...]  # indices of tokens, ascending
    carried: tuple[CarriedToken, ...] = ()
    leaving: tuple[Leaving, ...] = ()


class Order(msgspec.Struct, frozen=True, tag=True, tag_field="type"):
    """Base of what a leader orders."""


class Step(Order, frozen=True):
    """Run this batch through the model."""

    batch: Batch


class ExpectBlocks(Order, frozen=True):
    """Receiving side: KV of tokens [first_position, first_position + num_tokens) will come from source.

    block_ids is the block table of the whole prompt, from position 0. Answered with Expecting, then Received or Broken.
    """

    attempt: Attempt
    source: Endpoint
    block_ids: tuple[int, ...]
    first_position: int
    num_tokens: int


class SendBlocks(Order, frozen=True):
    """Sending side: send KV of tokens [first_position, first_position + num_tokens) to destination.

    block_ids is the block table of the whole prompt, from position 0. num_computed: positions from 0 whose KV is there
    by now, None for all; the others are announced by SendMore.
    """

    attempt: Attempt
    destination: Endpoint
    block_ids: tuple[int, ...]
    first_position: int
    num_tokens: int
    num_computed: int | None = None


class SendMore(Order, frozen=True):
    """Sending side: the KV of this attempt's positions below num_computed is there now. Unknown attempts are fine.

    num_layers: there in the first num_layers layers only; None for all.
    """

    attempt: Attempt
    num_computed: int
    num_layers: int | None = None


class DropTransfer(Order, frozen=True):
    """Either side: forget this transfer; what still comes of it is dropped and counted."""

    attempt: Attempt


class Park(Order, frozen=True):
    """Copy KV of the first num_tokens positions of a sequence to the host; its blocks may be reused after this."""

    attempt: Attempt
    block_ids: tuple[int, ...]
    num_tokens: int


class Unpark(Order, frozen=True):
    """Copy parked KV from first_position on back, into these blocks, and forget it; what is before is there already."""

    attempt: Attempt
    block_ids: tuple[int, ...]
    first_position: int


class Discard(Order, frozen=True):
    """Forget parked KV."""

    attempt: Attempt


class ClosePeer(Order, frozen=True):
    """Either side: the group of this epoch is gone; close every connection to it."""

    epoch: Epoch


class StopRank(Order, frozen=True):
    """End cleanly."""


class Report(msgspec.Struct, frozen=True, tag=True, tag_field="type"):
    """Base of what a rank tells its leader."""

    rank: int


class Enlist(Report, frozen=True):
    """A follower's first report: it has its weights and cache. kv_address: where it takes frames, "" for nowhere."""

    epoch: Epoch
    kv_address: str


class Expecting(Report, frozen=True):
    """ExpectBlocks was carried out: frames of this attempt may come."""

    attempt: Attempt


class Received(Report, frozen=True):
    """Every frame of this attempt that is meant for this rank was checked and copied into its blocks."""

    attempt: Attempt


class Broken(Report, frozen=True):
    """This attempt's transfer failed here; nothing of it may be used."""

    attempt: Attempt
    reason: str


class FetchBroken(Report, frozen=True):
    """What decode holds of this attempt's prompt does not get to prefill; the attempt itself may go on."""

    attempt: Attempt
    reason: str


class Counted(Report, frozen=True):
    """How often something was dropped, refused or repeated on this rank since its life began, by reason."""

    counters: dict[str, int]


AnyOrder = Step | ExpectBlocks | SendBlocks | SendMore | DropTransfer | Park | Unpark | Discard | ClosePeer | StopRank
AnyReport = Enlist | Expecting | Received | Broken | FetchBroken | Counted

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[AnyOrder] = msgspec.msgpack.Decoder(AnyOrder)
_reports: msgspec.msgpack.Decoder[AnyReport] = msgspec.msgpack.Decoder(AnyReport)


def encode(item: AnyOrder | AnyReport) -> bytes:
    """Return an order or a report as MessagePack."""
    return _encoder.encode(item)


def decode_order(data: bytes) -> AnyOrder:
    """Return the order in data, or raise WireError."""
    try:
        return _orders.decode(data)
    except UNPARSABLE as error:
        raise WireError(f"order does not parse: {error}") from error


def decode_report(data: bytes) -> AnyReport:
    """Return the report in data, or raise WireError."""
    try:
        return _reports.decode(data)
    except UNPARSABLE as error:
        raise WireError(f"report does not parse: {error}") from error
