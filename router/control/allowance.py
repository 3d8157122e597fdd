"""How much of what a rank says the router reads: more than any sound one says, and little beside its memory.

What arrives is counted before it is parsed, for parsing takes longer than receiving: whoever sends more than can be
parsed would fill the memory with what waits, and hold up every stream. Used by controller.py, which ends such a life.
"""

from collections import Counter

MOST_BYTES = 64 << 20
"""What a rank may have sent in a moment, as when the router has stood still: six seconds of 256 requests that draw a
hundred tokens a second each, with the most logprobs."""
BYTES_PER_TICK = 8 << 20
"""Fifty megabytes a second: the router could not act on so many tokens."""
MESSAGE_BYTES = 256
"""What a message costs beside its bytes."""


class Allowances:
    """Of every sender: what it has sent and not yet made up for by waiting."""

    def __init__(self) -> None:
        self._spent: Counter[bytes] = Counter()

    def spend(self, sender: bytes, num_bytes: int) -> bool:
        """Count a message; return whether it may be read."""
        self._spent[sender] += MESSAGE_BYTES + num_bytes
        return self._spent[sender] <= MOST_BYTES

    def tick(self) -> None:
        """Called a few times a second. Senders that owe nothing are forgotten."""
        spent = ((sender, num_bytes - BYTES_PER_TICK) for sender, num_bytes in self._spent.items())
        self._spent = Counter({sender: num_bytes for sender, num_bytes in spent if num_bytes > 0})
