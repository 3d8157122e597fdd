"""The oracle model: KV of a token is a hash of all KV before it, and the next token a hash of all KV it reads.

What is read comes from the ranks' real caches, through the block table, from every head of every rank. One block that
is foreign, stale, misplaced or not yet there changes the next token, and everything after it.
"""

import zlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from protocol.layout import KVLayout
from protocol.orders import Batch
from protocol.request import Request
from tests.sampling import row_of, sample

VOCAB_SIZE = 64
POISON = VOCAB_SIZE
"""A token that ends the life of whatever group computes it."""
_KV_BITS = (1 << 24) - 1  # room above for a mark of head and plane; never the pattern of an infinity or a NaN


def _kv_of(token_id: int, digest: int) -> int:
    return zlib.crc32(token_id.to_bytes(2, "little"), digest) & _KV_BITS


def _digest(kv: int, digest: int) -> int:
    return zlib.crc32(kv.to_bytes(4, "little"), digest)


def oracle_answer(request: Request) -> list[int]:
    """Return what an undisturbed run of request draws."""
    digest, output = 0, []
    sampling = request.sampling
    for token_id in request.prompt_token_ids:
        digest = _digest(_kv_of(token_id, digest), digest)
    while len(output) < sampling.max_tokens:
        output.append(_drawn(digest, request, output))
        if output[-1] in sampling.ending_token_ids and len(output) >= sampling.min_tokens:
            break
        digest = _digest(_kv_of(output[-1], digest), digest)
    return output


def _drawn(digest: int, request: Request, output: SequenceOf[int]) -> int:
    """Return the next token, alone in its batch."""
    if request.sampling.is_greedy:
        return digest % VOCAB_SIZE
    row = row_of(request.sampling, request.prompt_token_ids, output)
    return sample(torch.from_numpy(_logits([digest])), [row])[0].token_id


def _logits(digests: SequenceOf[int]) -> np.ndarray:
    """Return float32 [len(digests), VOCAB_SIZE]: one token is likelier than the others."""
    logits = np.zeros((len(digests), VOCAB_SIZE), np.float32)
    logits[range(len(digests)), [digest % VOCAB_SIZE for digest in digests]] = 3
    return logits


@dataclass
class RankCache:
    """One rank's cache as movers see it, and the same bytes as the oracle reads them."""

    planes: tuple[torch.Tensor, ...]  # keys and values, each [1 layer, num_blocks, own KV heads, block_size, 1]
    slots: np.ndarray  # int32 [2, own KV heads, num_blocks, block_size]
    marks: np.ndarray  # int32 [2, own KV heads, 1]: what tells planes and heads apart

    @staticmethod
    def empty(layout: KVLayout, rank: int, num_blocks: int) -> "RankCache":
        first, stop = layout.rank_heads(rank)[0]
        planes = torch.zeros(2, *layout.rank_shapes(rank, num_blocks)[0])
        slots = planes.numpy().view(np.int32)[:, 0, ..., 0].transpose(0, 2, 1, 3)
        marks = np.array([[[(2 * head + plane) << 24] for head in range(first, stop)] for plane in (0, 1)], np.int32)
        return RankCache(planes.unbind(), slots, marks)


class OracleModel:
    """The engines of all ranks of one group."""

    def __init__(self, caches: SequenceOf[RankCache], block_size: int) -> None:
        self._caches = caches
        self._block_size = block_size

    def forward(self, batch: Batch, drawn: torch.Tensor | None) -> torch.Tensor:
        """Run a batch over the caches of all ranks; return logits [num_sampled, VOCAB_SIZE]."""
        token_ids = list(batch.token_ids)
        for carried in batch.carried:
            assert drawn is not None
            token_ids[carried.index] = int(drawn[carried.row])
        tokens = iter(token_ids)
        chunks = zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True)
        digests = [
            digest
            for query_len, context_len, table in chunks
            for digest in self._run(table, context_len - query_len, [next(tokens) for _ in range(query_len)])
        ]
        return torch.from_numpy(_logits([digests[index] for index in batch.sampled]))

    def _run(self, table: bytes, start: int, token_ids: list[int]) -> list[int]:
        """Read the KV of positions [0, start), write that of token_ids, and return the digests up to each of them."""
        positions = np.arange(start + len(token_ids))
        blocks = np.frombuffer(table, np.int32)[positions // self._block_size]
        offsets = positions % self._block_size
        digest = self._read(blocks[:start], offsets[:start])
        fresh, digests = np.empty(len(token_ids), np.int32), []
        for index, token_id in enumerate(token_ids):
            fresh[index] = kv = _kv_of(token_id, digest)
            digest = _digest(kv, digest)
            digests.append(digest)
        for cache in self._caches:
            cache.slots[:, :, blocks[start:], offsets[start:]] = fresh | cache.marks
        return digests

    def _read(self, blocks: np.ndarray, offsets: np.ndarray) -> int:
        """Return the digest of what the slots hold; of all heads on all ranks, when they do not agree."""
        if not len(blocks):
            return 0
        read = [cache.slots[:, :, blocks, offsets] ^ cache.marks for cache in self._caches]
        plain = read[0][0, 0]
        if all((heads == plain).all() for heads in read):
            return zlib.crc32(plain.tobytes())
        return zlib.crc32(b"".join(heads.tobytes() for heads in read))
