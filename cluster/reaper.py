"""Nothing outlives an `up` that started Ray: not even when it was killed and could end nothing itself.

A process of its own waits until its stdin ends, which the kernel sees to, and then ends whatever still bears the mark
of this `up` in its environment: Ray's processes and the workers. The router bears none: it ends with a stdin of its
own, and may still have to tell its clients.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = "TANDEM_UP"
_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.05


class Reaper:
    """Started by the driver before anything that is to bear the mark."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.reaper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the terminal's processes is not for this one
        )
        assert self._process.stdin is not None
        self._process.stdin.write(self._mark.encode() + b"\n")
        self._process.stdin.flush()

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Let whatever is started meanwhile bear the mark, and what that starts later."""
        os.environ[_NAME] = self._mark
        try:
            yield
        finally:
            del os.environ[_NAME]

    def close(self) -> None:
        """End what is left, and return when it is gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * _WITHIN_S)


def main() -> None:
    """Read the mark, wait for the end of stdin, then end everything that bears the mark."""
    mark = sys.stdin.read().strip()
    deadline = time.monotonic() + _WITHIN_S
    while (marked := _marked(mark)) and time.monotonic() < deadline:
        for pid in marked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_EVERY_S)


def _marked(mark: str) -> list[int]:
    """Return the processes that bear the mark, those that have ended but for their parent's notice left out."""
    entry = f"{_NAME}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    main()
