"""What a person watching `up` sees: one line for every change in how the workers are doing.

Fed with the router's status by the supervisor. On a terminal the starting line is rewritten in place; in a log every
change is a line of its own. Keeps only what it has said, never decides anything.
"""

import sys
from contextlib import suppress
from typing import TextIO

from cluster.status_client import ClusterStatus, WorkerStatus

_CLEAR_LINE = "\r\x1b[2K"


class ProgressDisplay:
    """Tells num_workers workers' way to ready, and afterwards who is lost and who is back."""

    def __init__(self, num_workers: int, out: TextIO = sys.stdout) -> None:
        self._num_workers = num_workers
        self._out = out
        self._is_terminal = out.isatty()
        self._said: dict[str, str] = {}
        self._transient = False

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._write(f"{_CLEAR_LINE if self._transient else ''}{line}\n")
        self._transient = False

    def show(self, status: ClusterStatus) -> None:
        """Say what has changed since the last time."""
        for worker in status.workers:
            self._note(worker.name, _describe(worker))
        num_ready = sum(worker.state == "ready" for worker in status.workers)
        self._note("workers", f"ready {num_ready} of {self._num_workers}")

    def tell_capacity(self, status: ClusterStatus, max_context: int) -> None:
        """Say what each group's KV cache holds, in tokens and in requests of full length."""
        for worker in status.workers:
            num_tokens = worker.blocks.total * worker.block_size
            if num_tokens and worker.rank == 0:
                num_requests = num_tokens / max_context
                self.say(
                    f"{worker.name}: KV cache of {num_tokens:,} tokens, {num_requests:,.1f} requests of {max_context:,}"
                )

    def _note(self, subject: str, news: str) -> None:
        if self._said.get(subject) == news:
            return
        self._said[subject] = news
        line = f"{subject} {news}" if subject == "workers" else f"{subject}: {news}"
        if self._is_terminal:
            self._write(f"{_CLEAR_LINE}{line}")
            self._transient = True
        else:
            self.say(line)

    def _write(self, text: str) -> None:
        """The reader may have gone, or the disk be full: that costs lines, never the cluster."""
        with suppress(OSError):
            self._out.write(text)
            self._out.flush()


def _describe(worker: WorkerStatus) -> str:
    if worker.state == "starting":
        return worker.doing or "starting"
    return "lost; Ray starts it again" if worker.state == "dead" else worker.state
