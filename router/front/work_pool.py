"""Threads for one kind of work, and a line of bounded length before them.

Tokenizing, chat templates and the metrics page have one each, so that none of them can keep the others waiting.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from router.front.errors import overloaded

T = TypeVar("T")


class WorkPool:
    """name: what the work is, as clients read it when there is too much of it."""

    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        self._name = name
        self._most = num_threads + max_waiting
        self._num_inside = 0
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Return what work returns or raises. Raise ApiError 429 when too many wait already."""
        if self._num_inside == self._most:
            raise overloaded(f"too many calls wait for {self._name}")
        self._num_inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        finally:
            self._num_inside -= 1

    def close(self) -> None:
        """Begin nothing more; what a thread has begun it finishes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
