"""What clients may hold of something at once: all together, and each address by itself.

Used for connections (http_protocol.py) and for the memory of bodies that are still arriving (body.py). It keeps books
only; what is refused to whom, and how, is said by those who ask.
"""

import ipaddress
from collections import Counter


class Quota:
    """total bounds the sum, per_owner what one owner has of it, so that nobody can keep everybody else out."""

    def __init__(self, total: int, per_owner: int) -> None:
        self._total = total
        self._per_owner = per_owner
        self._used = 0
        self._used_by: Counter[str] = Counter()

    def take(self, owner: str, amount: int) -> bool:
        """Give owner so much more, or nothing and return False."""
        if self._used + amount > self._total or self._used_by[owner] + amount > self._per_owner:
            return False
        self._used += amount
        self._used_by[owner] += amount
        return True

    def give_back(self, owner: str, amount: int) -> None:
        self._used -= amount
        self._used_by[owner] -= amount
        assert self._used_by[owner] >= 0, "more was given back than taken"
        if not self._used_by[owner]:
            del self._used_by[owner]


def owner_of(client: tuple[str, int] | None) -> str:
    """Return whom a client's address belongs to: of IPv6 the network, because every host has 2^64 addresses in one."""
    host = client[0].partition("%")[0] if client else ""
    return str(ipaddress.ip_network((host, 64), strict=False)) if ":" in host else host
