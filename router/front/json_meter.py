"""Counts what a JSON text will become before it is decoded, piece by piece while it arrives. For body.py.

A decoder lets nothing else run until it is done, in whichever thread it runs: four mebibytes of "[]," are a second in
which no stream moves. Counting them costs some milliseconds, and stops at the first piece that goes too far.
"""


class JsonMeter:
    """num_values: an upper bound of the values so far, members of objects included. num_containers: lists and objects.

    What is no JSON is counted somehow; a decoder stops where it ceases to be.
    """

    def __init__(self) -> None:
        self.num_values = self.num_containers = 0
        self._is_in_string = False
        self._escape = b""  # a backslash that the next piece's first byte belongs to

    def feed(self, piece: bytes) -> None:
        """Count on. Nothing here looks at single bytes in Python: a piece of 64 KiB takes less than a millisecond."""
        text = (self._escape + piece).replace(b"\\\\", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        between = text.replace(b'\\"', b"").split(b'"')
        outside = b"".join(between[1 if self._is_in_string else 0 :: 2])
        self._is_in_string ^= len(between) % 2 == 0
        num_containers = outside.count(b"[") + outside.count(b"{")
        self.num_containers += num_containers
        self.num_values += num_containers + outside.count(b",")
