"""Breadth-first search through everything that can happen in a small world, and the cheap copies that it lives on."""

import copyreg
import io
import pickle
from collections import deque
from collections.abc import Callable

from protocol.identity import Attempt
from protocol.layout import Endpoint, KVLayout
from protocol.request import Request
from tests.simulation.small_world import Event, SmallWorld, Violation

# --- copies: what never changes is named, not copied ------------------------------------------------------------------

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
    dispatch_table[Request] = _named(lambda request: ("request", request.request_id))
    dispatch_table[Endpoint] = _named(lambda endpoint: ("endpoint", endpoint.epoch, endpoint.layout.block_size))
    dispatch_table[KVLayout] = _named(lambda layout: ("layout", layout.block_size))
    dispatch_table[Attempt] = _named(
        lambda attempt: tuple(getattr(attempt, name) for name in attempt.__struct_fields__)
    )


def freeze(world: SmallWorld) -> bytes:
    """Return a copy that thaw makes a world of again."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(world)
    return buffer.getvalue()


def thaw(frozen: bytes) -> SmallWorld:
    return pickle.loads(frozen)


def explore(world: SmallWorld, max_states: int) -> int:
    """Try everything that can happen, breadth first; return how many states there are.

    Raise Violation with the shortest way to it. Attempts get their transfer ids from their requests, so that equal
    states are equal.
    """
    start = freeze(world)
    paths: dict[int, tuple[int, Event | None]] = {0: (0, None)}
    seen = {hash(world.key())}
    queue = deque([(0, start)])
    while queue:
        number, frozen = queue.popleft()
        state = thaw(frozen)
        key, is_stuck = state.key(), True
        faults = state.faults()
        for event in [*state.events(), *faults]:
            follower = thaw(frozen)
            try:
                follower.happen(event)
            except AssertionError as error:
                raise Violation(f"{error}; after {_path(paths, number, event)}") from error
            follower_key = follower.key()
            if follower_key == key:
                continue
            is_stuck &= event in faults
            if hash(follower_key) not in seen:
                seen.add(hash(follower_key))
                paths[len(paths)] = (number, event)
                queue.append((len(paths) - 1, freeze(follower)))
        if is_stuck:
            try:
                state.check_end()
            except Violation as error:
                raise Violation(f"{error}; after {_path(paths, number, None)}") from error
        if len(seen) > max_states:
            raise Violation(f"more than {max_states} states")
    return len(seen)


def _path(paths: dict[int, tuple[int, Event | None]], number: int, last: Event | None) -> str:
    events = [last]
    while number:
        number, event = paths[number]
        events.append(event)
    return " ; ".join(f"{event[0]} {event[1]}" for event in reversed(events) if event)
