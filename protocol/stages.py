"""The ladder of a request's life. Logs, metrics and the router's state machine read the same names."""

from enum import IntEnum


class Stage(IntEnum):
    """Where an attempt is. It only ever climbs; the last three rungs are ends, and an attempt reaches exactly one."""

    QUEUED = 0
    PREFILLING = 1
    TRANSFERRING = 2
    DECODING = 3
    FINISHED = 4
    CANCELLED = 5
    FAILED = 6

    @property
    def is_end(self) -> bool:
        return self >= Stage.FINISHED
