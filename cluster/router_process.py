"""The router as a child process of the driver: started, asked where it listens, ended.

It gets its launch as one line of JSON on stdin and answers with one line of JSON on stdout. The pipe stays open for as
long as the driver lives: its end tells the router that the driver is gone, so that what runs finishes or is told.
"""

import os
import select
import subprocess
import sys
import time
from contextlib import suppress

import msgspec

from protocol.errors import ConfigError, TandemError
from router.launch import Addresses, RouterLaunch

_START_S = 30.0
_CANNOT_WORK = 2  # the router's exit code for a ConfigError


class RouterProcess:
    """A running router."""

    def __init__(self, launch: RouterLaunch) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "router"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"TANDEM_LOG_LEVEL": "WARNING", **os.environ},  # its stderr is the terminal
            start_new_session=True,  # a Ctrl-C is the driver's to hear, which then drains
        )
        self._tell(msgspec.json.encode(launch) + b"\n")
        self.addresses = self._read_addresses()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def drain(self, patience_s: float) -> None:
        """Ask it to finish what runs, to stop the workers and to end; wait for that for so long."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)

    def end(self) -> None:
        """Make sure that it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already; reading its answer says so with its exit code
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read_addresses(self) -> Addresses:
        line = self._read_line(time.monotonic() + _START_S)
        try:
            return msgspec.json.decode(line, type=Addresses)
        except msgspec.DecodeError:
            self.end()
            kind = ConfigError if self.exit_code == _CANNOT_WORK else TandemError
            raise kind(f"the router did not start (exit code {self.exit_code}); what it said is above") from None

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
            if select.select([self._process.stdout], [], [], left)[0]:
                piece = self._process.stdout.read1(4096)  # type: ignore[attr-defined]
                if not piece:
                    break
                line += piece
        return line
