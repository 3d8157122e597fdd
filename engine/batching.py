"""Chunks of many sequences -> one Batch for the ranks. Called by the step loop; decides nothing, only lays out."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf

from engine.sequence import Chunk, Sequence
from protocol.orders import BLOCK_ID_BYTES, Batch, CarriedToken, Leaving


def lay_out(chunks: SequenceOf[Chunk]) -> list[Chunk]:
    """Return the chunks in a batch's order: single tokens first, otherwise as they came."""
    return sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)


def build_batch(chunks: SequenceOf[Chunk], block_size: int, rows: Mapping[Sequence, int]) -> Batch:
    """Return the batch of chunks that are laid out. Each block table reaches to the end of its chunk and no further.

    rows: where the step under way draws the next token of a sequence.
    """
    return Batch(
        token_ids=tuple(token for chunk in chunks for token in _tokens(chunk)),
        query_lens=tuple(chunk.num_tokens for chunk in chunks),
        context_lens=tuple(chunk.end for chunk in chunks),
        block_tables=tuple(_table(chunk, block_size) for chunk in chunks),
        sampled=tuple(_sampled(chunks)),
        carried=tuple(
            CarriedToken(index, rows[chunk.sequence]) for index, chunk in enumerate(chunks) if chunk.is_carried
        ),
        leaving=tuple(Leaving(chunk.sequence.attempt, chunk.end) for chunk in chunks if chunk.sequence.is_leaving),
    )


def _sampled(chunks: SequenceOf[Chunk]) -> Iterator[int]:
    """Yield the indices of the tokens at wanted positions, in the order of the chunks."""
    first_token = 0
    for chunk in chunks:
        yield from (first_token + position - chunk.start for position in chunk.wanted)
        first_token += chunk.num_tokens


def _table(chunk: Chunk, block_size: int) -> bytes:
    num_blocks = -(-chunk.end // block_size)
    return chunk.sequence.hold.table[: num_blocks * BLOCK_ID_BYTES]


def _tokens(chunk: Chunk) -> list[int]:
    """A carried token is unknown here; the ranks put it in the place of the 0."""
    return [0] if chunk.is_carried else chunk.sequence.token_ids[chunk.start : chunk.end]
