"""Chunks of many sequences -> one Batch for the ranks. Called by the step loop; decides nothing, only lays out."""

from collections.abc import Sequence as SequenceOf

from engine.sequence import Chunk
from protocol.orders import Batch


def lay_out(chunks: SequenceOf[Chunk]) -> list[Chunk]:
    """Return the chunks in a batch's order: single tokens first, otherwise as they came."""
    return sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)


def build_batch(chunks: SequenceOf[Chunk], block_size: int) -> Batch:
    """Return the batch of chunks that are laid out. Each block table reaches to the end of its chunk and no further."""
    return Batch(
        token_ids=tuple(token for chunk in chunks for token in _tokens(chunk)),
        query_lens=tuple(chunk.num_tokens for chunk in chunks),
        context_lens=tuple(chunk.end for chunk in chunks),
        block_tables=tuple(chunk.sequence.hold.block_ids[: -(-chunk.end // block_size)] for chunk in chunks),
        sampled=tuple(index for index, chunk in enumerate(chunks) if chunk.is_sampled),
    )


def _tokens(chunk: Chunk) -> list[int]:
    return chunk.sequence.token_ids[chunk.sequence.num_computed : chunk.end]
