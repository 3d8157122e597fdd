"""What decode groups seem to hold of conversations, so that prefill knows for which grants it pays to wait.

When a request has ended, its KV lies in its decode group's prefix cache until the room is needed. How long that is the
router does not know, so this is a guess; a wrong one costs a moment and nothing else. Used by attempts.py.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from protocol.identity import Epoch

PIECE_TOKENS = 16
"""The smallest block size: what decode holds is never much longer than the guess."""

MAX_PIECES = 1 << 17
"""Two million tokens; the least recently used are forgotten first."""

_Name = tuple[Epoch, int]


class HeldPrefixes:
    """Token sequences by decode epoch, in pieces of PIECE_TOKENS, each named by itself and all that comes before it."""

    def __init__(self, max_pieces: int = MAX_PIECES) -> None:
        self._max_pieces = max_pieces
        self._pieces: OrderedDict[_Name, None] = OrderedDict()

    def remember(self, epoch: Epoch, salt: str, token_ids: Sequence[int]) -> None:
        """This group holds the KV of these tokens now."""
        for name in _names(epoch, salt, token_ids):
            self._pieces[name] = None
            self._pieces.move_to_end(name)
        while len(self._pieces) > self._max_pieces:
            self._pieces.popitem(last=False)

    def num_held(self, epoch: Epoch, salt: str, token_ids: Sequence[int]) -> int:
        """Return how many of the first tokens this group seems to hold."""
        num_pieces = 0
        for name in _names(epoch, salt, token_ids):
            if name not in self._pieces:
                break
            num_pieces += 1
        return num_pieces * PIECE_TOKENS

    def forget(self, epoch: Epoch) -> None:
        """This group is gone, with all it held."""
        for name in [name for name in self._pieces if name[0] == epoch]:
            del self._pieces[name]


def _names(epoch: Epoch, salt: str, token_ids: Sequence[int]) -> Iterator[_Name]:
    chained = hash(salt)
    for start in range(0, len(token_ids) - PIECE_TOKENS + 1, PIECE_TOKENS):
        chained = hash((chained, tuple(token_ids[start : start + PIECE_TOKENS])))
        yield epoch, chained
