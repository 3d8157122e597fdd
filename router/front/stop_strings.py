"""Finds stop strings in text that comes in pieces, holding back what may yet become one.

Used by choice.py. The text given out never contains a stop string nor any part of one that completes.
"""

from collections.abc import Sequence


class StopStrings:
    """feed pieces, get back what is safe to show; once matched is set, nothing more is."""

    def __init__(self, stops: Sequence[str], shows_match: bool = False) -> None:
        """shows_match: the stop string that was found is given out as well."""
        self._stops = tuple(stops)
        self._shows_match = shows_match
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Return the text that can no longer be part of a stop string; set matched when one is complete."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        start, stop = self._first(text)
        if stop is not None:
            self.matched, self._held = stop, ""
            return text[: start + len(stop)] if self._shows_match else text[:start]
        cut = len(text) - self._num_held(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str | None]:
        """The match that is complete first counts; of those that end together, the one that starts first."""
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if not found:
            return 0, None
        return min(found, key=lambda match: (match[0] + len(match[1]), match[0]))

    def _num_held(self, text: str) -> int:
        """Length of the longest end of text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((size for size in range(longest, 0, -1) if self._begins_stop(text[-size:])), 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
