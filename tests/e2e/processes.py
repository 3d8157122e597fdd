"""Real processes under test: every descendant carries a mark in its environment, so that none can stay unseen."""

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

_MARK = "TANDEM_TEST_MARK"

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], deadline_s: float, what: str) -> T:
    """Return what look returns once that counts as true; fail when it takes longer than deadline_s."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {deadline_s:g} s")


class MarkedProcess:
    """A command whose output is kept and whose descendants can be found, wherever they went."""

    def __init__(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self._shared_memory = _shared_memory()
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {}), name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_for_text(self, text: str, deadline_s: float) -> str:
        """Return what follows text in the first line that has it."""

        def look() -> str | None:
            found = next((line for line in self._lines if text in line), None)
            assert found or self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            return found

        try:
            return wait_for(look, deadline_s, f'"{text}" is said').partition(text)[2].strip()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None

    def wait(self, deadline_s: float) -> int:
        """Return the exit code."""
        code = self.process.wait(deadline_s)
        self._reader.join(5)
        return code

    def descendants(self) -> list[str]:
        """Return "pid command" of every living process that was started, directly or not, by this one."""
        return [name for pid, name in _processes_with(self._mark.encode()) if pid != self.process.pid]

    def left_behind(self) -> list[str]:
        """Return what is still there of processes and shared memory."""
        return self.descendants() + sorted(_shared_memory() - self._shared_memory)

    def assert_nothing_left(self, deadline_s: float = 5.0) -> None:
        """Fail when something of it outlives it by more than deadline_s."""
        try:
            wait_for(lambda: not self.left_behind(), deadline_s, "nothing is left behind")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.left_behind()}") from None

    def destroy(self) -> None:
        """End whatever is left, without questions."""
        for pid, _ in _processes_with(self._mark.encode()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)


def _processes_with(mark: bytes) -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(folder.name), f"{folder.name} {command[:100]}"))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def _shared_memory() -> set[str]:
    return {str(path) for path in Path("/dev/shm").iterdir()}
