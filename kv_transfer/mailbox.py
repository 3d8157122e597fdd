"""A queue from transport threads to a rank's main thread, bounded in bytes, that a poller can sleep on.

Every transport delivers through one. Bytes are counted until the main thread takes them, so that a busy main thread
slows the network down instead of filling the memory.
"""

import os
import threading
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Mailbox(Generic[ItemT]):
    """Any number of threads put, one thread takes. fileno() is readable while there is something to take."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: deque[tuple[ItemT, int]] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, item: ItemT, num_bytes: int = 0) -> None:
        """Add an item, waiting while the box is full; an item larger than the box fits when it is empty.

        After close, items are dropped at once.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(num_bytes))
            if self._closed:
                return
            if not self._items:  # or else it has rung, and nobody has taken since
                os.eventfd_write(self._bell, 1)
            self._items.append((item, num_bytes))
            self._num_bytes += num_bytes

    def take(self, max_bytes: int) -> list[ItemT]:
        """Return what has come, in order: at least one item if there is any, and no more once max_bytes are reached."""
        taken: list[ItemT] = []
        with self._changed:
            if self._closed:
                return taken
            self._silence()
            while self._items and max_bytes > 0:
                item, num_bytes = self._items.popleft()
                taken.append(item)
                self._num_bytes -= num_bytes
                max_bytes -= num_bytes
            if self._items:
                os.eventfd_write(self._bell, 1)
            self._changed.notify_all()
        return taken

    def ring(self) -> None:
        """Make fileno() readable until the next take, although nothing was put."""
        with self._changed:
            if not self._closed:
                os.eventfd_write(self._bell, 1)

    @property
    def is_empty(self) -> bool:
        """Whether all that was put has been taken."""
        return not self._items

    def fileno(self) -> int:
        return self._bell

    def close(self) -> None:
        """Drop all items, and let every thread that waits in put return. May be called twice."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._items.clear()
            os.close(self._bell)
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        return not self._items or self._num_bytes + num_bytes <= self._max_bytes

    def _silence(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
