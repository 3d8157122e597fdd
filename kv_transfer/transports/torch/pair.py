"""One end of a pair of ranks: a communicator of torch.distributed, and the thread that opens it and works through it.

Used by both sides of the torch transports. To open a communicator the two ends need a store in which one finds what the
other has set; here it is the connection between them, so nobody else can take part and nothing more listens.
"""

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import msgspec
from torch.distributed.distributed_c10d import Store

from kv_transfer import threads
from kv_transfer.transports.torch.communicator import Backend, Communicator
from kv_transfer.transports.wire import encode_answer
from protocol.errors import UNPARSABLE

RENDEZVOUS = 2**64 - 1
"""In place of a frame's sequence number: what is said is for the store of the other end."""

MAX_ENTRIES = 64
"""Of what the other end has set; a pair needs a handful."""

_CLOSE_S = 1.0

ItemT = TypeVar("ItemT")


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """What one end has set."""

    key: str
    value: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Entry)


class ConnectionStore(Store):
    """What either end sets, both ends get. say: sends a message to the other. Called by torch, from any thread."""

    def __init__(self, say: Callable[[bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._say = say
        self._timeout_s = timeout_s
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def hear(self, said: bytes) -> None:
        """Take what the other end has set. Raises ValueError for what is no entry, or one too many."""
        try:
            entry = _decoder.decode(said)
        except UNPARSABLE as error:
            raise ValueError(f"an entry that does not parse: {error}") from error
        if len(self._entries) >= MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES} entries for a pair's store")
        self._keep(entry)

    def close(self) -> None:
        """Let go of whoever waits for the other end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def set(self, key: str, value: str | bytes) -> None:
        entry = _Entry(key, value.encode() if isinstance(value, str) else bytes(value))
        self._keep(entry)
        self._say(encode_answer(RENDEZVOUS, _encoder.encode(entry)))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._entries[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._entries for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Raises RuntimeError when the other end does not set them in time."""
        timeout_s = min(self._timeout_s, timeout.total_seconds()) if timeout else self._timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self.check(keys), timeout_s)
            if not self.check(keys):
                raise RuntimeError(f"the other end of the pair did not come within {timeout_s:g} s")

    def _keep(self, entry: _Entry) -> None:
        with self._changed:
            self._entries[entry.key] = entry.value
            self._changed.notify_all()


class PairEnd(Generic[ItemT]):
    """rank: this end's, SENDER or RECEIVER. carry: called with each item that was put, in order, on the pair's thread.

    When opening or carrying fails, failed is called with the error, once, and nothing more is carried.
    """

    def __init__(
        self,
        backend: Backend,
        rank: int,
        store: ConnectionStore,
        carry: Callable[[Communicator, ItemT], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.is_open = False
        self._store = store
        self._backend = backend
        self._rank = rank
        self._carry = carry
        self._failed = failed
        self._items: deque[ItemT] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threads.start(("kv-pair-sender", "kv-pair-receiver")[rank], self._run)

    @property
    def num_waiting(self) -> int:
        return len(self._items)

    def put(self, item: ItemT) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """Let the thread end. In the middle of an operation it ends with that, after timeout_s at the latest.

        One that opens a pair over NCCL ends when the other end has come, and perhaps never if that died just then.
        """
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._changed.notify_all()
        self._store.close()

    def wait_closed(self) -> None:
        """Wait for the thread to end, for a moment."""
        threads.has_ended(self._thread, _CLOSE_S)

    def _run(self) -> None:
        try:
            communicator = self._backend.open_communicator(self._store, self._rank)
            try:
                self.is_open = True
                while (item := self._next()) is not None:
                    self._carry(communicator, item)
            finally:
                communicator.abort()
        except Exception as error:  # whatever torch raises, it ends this pair and nothing else
            if not self._is_closed:
                self._failed(error)

    def _next(self) -> ItemT | None:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_closed)
            return None if self._is_closed else self._items.popleft()


Pairs = WeakSet[PairEnd[Any]]
"""Those of one transport whose threads have not ended, and perhaps some more."""


def wait_closed(pairs: Pairs) -> None:
    """Wait for the threads of pairs that were closed, for a moment each: torch's must not run when the process ends."""
    for pair in list(pairs):
        pair.wait_closed()
