"""Cheap copies of small worlds: what never changes is named, and what an event leaves alone is not even looked at."""

import copyreg
import io
import pickle
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from protocol.identity import Attempt
from protocol.layout import Endpoint, KVLayout
from protocol.request import Request

ItemT = TypeVar("ItemT")

_BY_NAME: dict[object, object] = {}


def _by_name(name: object) -> object:
    return _BY_NAME[name]


def _named(name_of: Callable[[object], object]):
    def reduce(item: object):
        name = name_of(item)
        _BY_NAME.setdefault(name, item)
        return _by_name, (name,)

    return reduce


class _Pickler(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table.copy()
    dispatch_table[Request] = _named(lambda request: ("request", request.request_id, request.generated_token_ids))
    dispatch_table[Endpoint] = _named(lambda endpoint: ("endpoint", endpoint.epoch, endpoint.layout.block_size))
    dispatch_table[KVLayout] = _named(lambda layout: ("layout", layout.block_size))
    dispatch_table[Attempt] = _named(
        lambda attempt: tuple(getattr(attempt, name) for name in attempt.__struct_fields__)
    )


def freeze(item: object) -> bytes:
    """Return a copy that thaw makes an equal item of again."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(item)
    return buffer.getvalue()


def thaw(frozen: bytes):
    return pickle.loads(frozen)


class Part(Generic[ItemT]):
    """A part of a world that shares nothing that changes with other parts. It stays frozen until somebody needs it.

    key_of: what tells one state of it from others.
    """

    def __init__(self, item: ItemT, key_of: Callable[[ItemT], Hashable]) -> None:
        self._item: ItemT | None = item
        self._key_of = key_of
        self._frozen = (b"", 0)

    @property
    def is_in_use(self) -> bool:
        return self._item is not None

    @property
    def item(self) -> ItemT:
        if self._item is None:
            self._item = thaw(self._frozen[0])
        return self._item

    @property
    def key(self) -> int:
        return self._frozen[1] if self._item is None else hash(self._key_of(self._item))

    def __getstate__(self) -> tuple:
        frozen = self._frozen if self._item is None else (freeze(self._item), self.key)
        return self._key_of, frozen

    def __setstate__(self, state: tuple) -> None:
        self._item = None
        self._key_of, self._frozen = state
