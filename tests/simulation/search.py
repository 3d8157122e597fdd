"""Breadth-first search through everything that can happen in a small world."""

from collections import deque

from tests.simulation.copies import freeze, thaw
from tests.simulation.small_life import Violation
from tests.simulation.small_world import Event, SmallWorld


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
