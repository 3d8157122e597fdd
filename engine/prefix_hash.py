"""Names for the content of full KV blocks: a chain of sha256 over model, salt and tokens.

Equal names mean equal tokens from position 0 on, in the same model, for the same salt; so blocks can be shared by name.
Used by sequences and the block pool. A hash that an attacker could collide would hand one client another's KV, which is
why it is a cryptographic one (half a microsecond a block).
"""

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf

from protocol.request import Request


def chain_root(model_hash: str, salt: str) -> bytes:
    """Return the name that stands before a sequence's first block."""
    parts = (model_hash.encode(), salt.encode("utf-8", "surrogatepass"))
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


class HashChain:
    """The names of one sequence's full blocks; grows with the sequence."""

    def __init__(self, root: bytes, block_size: int) -> None:
        self._root = root
        self._block_size = block_size
        self._hashes: list[bytes] = []

    def of(self, token_ids: SequenceOf[int], num_tokens: int) -> list[bytes]:
        """Return the names of the full blocks within the first num_tokens of token_ids."""
        num_blocks = num_tokens // self._block_size
        for index in range(len(self._hashes), num_blocks):
            self._hashes.append(self._name(index, token_ids))
        return self._hashes[:num_blocks]

    def of_held(self, request: Request) -> list[bytes]:
        """Return the names of the blocks whose KV need not be computed for request, if it is held somewhere.

        What is wanted of a position is computed: of the last, or of all where log probabilities of the prompt are.
        """
        num_tokens = 0 if request.has_prompt_logprobs else request.num_known_tokens - 1
        return self.of(request.known_token_ids, num_tokens)

    def _name(self, index: int, token_ids: SequenceOf[int]) -> bytes:
        parent = self._hashes[index - 1] if index else self._root
        tokens = array("q", token_ids[index * self._block_size : (index + 1) * self._block_size])
        return hashlib.sha256(parent + tokens.tobytes()).digest()
