"""Prompts that have ended worker after worker: refused for a while, whoever sends them. Pure; used by attempts.py."""

import hashlib
from array import array
from collections import OrderedDict

from protocol.request import Request

QUARANTINE_S = 600.0
MAX_QUARANTINED = 4096
"""Beyond these the oldest are forgotten first."""


class Quarantined(Exception):
    """This prompt is not tried now; the message says why."""


class Quarantine:
    """Fingerprints of prompts, each until a moment on the clock of the caller."""

    def __init__(self) -> None:
        self._until_s: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, request: Request, now_s: float) -> None:
        """Refuse this prompt from now on."""
        self._until_s[_fingerprint(request)] = now_s + QUARANTINE_S
        if len(self._until_s) > MAX_QUARANTINED:
            self._until_s.popitem(last=False)

    def check(self, request: Request, now_s: float) -> None:
        """Raise Quarantined for a prompt that is refused."""
        if not self._until_s:
            return
        left_s = self._until_s.get(_fingerprint(request), now_s) - now_s
        if left_s > 0:
            raise Quarantined(f"this prompt has ended several workers; it is not tried again for {left_s:.0f} s")

    def expire(self, now_s: float) -> None:
        """Forget what is over; all stay equally long, so the oldest end first."""
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._until_s.popitem(last=False)


def _fingerprint(request: Request) -> bytes:
    return hashlib.blake2b(array("q", request.prompt_token_ids).tobytes(), digest_size=16).digest()
