"""The sequences that run on a decode group: they grow, and when blocks run out, the youngest are parked on the host.

Called by the decode role. With growth_tokens a request begins with less room than it may come to need, provided that
all it may come to need fits into host memory, so that it can always make way. A sequence that needs blocks may park
those that arrived after it, and otherwise waits; parked ones come back, oldest first, before anybody new is let in. So
the oldest never waits for a younger one (docs/decisions/0003-no-deadlock.md). Elsewhere parking is called
preemption, with swapping.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from decode_worker.reservation import Reservation
from engine.block_pool import BlockPool
from engine.role import Ranks
from engine.sequence import Sequence
from protocol.identity import Attempt
from protocol.orders import Discard, Park, Unpark


@dataclass(frozen=True)
class Growth:
    """growth_tokens: room for so many more tokens at a time, None for all at once. max_parked_blocks: on every rank."""

    growth_tokens: int | None = None
    max_parked_blocks: int = 0


ALL_AT_ONCE = Growth()


class Running:
    """Running and parked sequences, each oldest first."""

    def __init__(self, pool: BlockPool, ranks: Ranks, growth: Growth) -> None:
        self._pool = pool
        self._ranks = ranks
        self._growth = growth
        self._running: list[Reservation] = []
        self._parked: list[Reservation] = []
        self._is_short = False  # somebody was parked in this step
        self._booked: dict[Attempt, int] = {}  # host blocks for those that began with less than they may need
        self.counters = {"sequences_parked": 0, "sequences_unparked": 0}

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._running)

    # --- before it runs -----------------------------------------------------------------------------------------------

    def num_first_blocks(self, reservation: Reservation) -> int:
        """Return how many blocks it begins with: room for growth_tokens if it can be parked, otherwise for all."""
        most = self._pool.blocks_for(reservation.max_num_computed)
        can_park = sum(self._booked.values()) + most <= self._growth.max_parked_blocks
        return self._room_for(reservation, reservation.num_known_tokens) if can_park else most

    def book(self, reservation: Reservation) -> None:
        """It has its first blocks; when they are not all it may need, keep room for it on the host until it is over."""
        most = self._pool.blocks_for(reservation.max_num_computed)
        if reservation.hold and len(reservation.hold.block_ids) < most:
            self._booked[reservation.attempt] = most

    def add(self, reservation: Reservation) -> None:
        """Its KV is there: let it run."""
        insort(self._running, reservation, key=lambda other: other.number)

    def remove(self, reservation: Reservation) -> None:
        """It is over, wherever it was; if it holds blocks, its owner releases them."""
        self._booked.pop(reservation.attempt, None)
        if reservation in self._running:
            self._running.remove(reservation)
        elif reservation in self._parked:
            self._parked.remove(reservation)
            self._ranks.order(Discard(reservation.attempt))

    # --- every step ---------------------------------------------------------------------------------------------------

    def make_room(self, max_sequences: int) -> None:
        """Give blocks to those of the oldest max_sequences that need some for their next token."""
        self._is_short = False
        for reservation in self._lacking(self._running[:max_sequences]):
            if not reservation.hold:
                break  # an older one has just parked it, and everybody behind it who may need blocks
            self._grow(reservation)

    def restore(self) -> bool:
        """Bring back what is parked, and return whether nobody needs blocks any more, so that others may come."""
        if self._is_short or self._lacking(self._running):
            return False
        while self._parked and self._unpark(self._parked[0]):
            self.add(self._parked.pop(0))
        return not self._parked

    def ready(self, max_sequences: int) -> list[Sequence]:
        """Return the oldest that have room for their next token."""
        lacking = set(self._lacking(self._running))
        sequences = [r.sequence for r in self._running if r not in lacking]
        return [sequence for sequence in sequences if sequence and not sequence.is_drawn][:max_sequences]

    def _lacking(self, reservations: list[Reservation]) -> list[Reservation]:
        """Return those that have no slot for the token that is next to be computed, if any is."""
        if self._growth.growth_tokens is None:
            return []
        return [reservation for reservation in reservations if not self._has_room(reservation)]

    def _has_room(self, reservation: Reservation) -> bool:
        sequence, hold = reservation.placed
        return sequence.num_launched < len(hold.block_ids) * self._pool.block_size or sequence.is_drawn

    def _room_for(self, reservation: Reservation, num_launched: int) -> int:
        """Return how many blocks hold num_launched tokens and the growth that a sequence gets at a time."""
        most = reservation.max_num_computed
        growth = self._growth.growth_tokens
        return self._pool.blocks_for(most if growth is None else min(most, num_launched + growth))

    def _grow(self, reservation: Reservation) -> None:
        sequence, hold = reservation.placed
        if hold.grow(self._room_for(reservation, sequence.num_launched) - len(hold.block_ids)):
            return
        while not hold.grow(1) and (youngest := self._youngest_after(reservation)):
            self._park(youngest)

    def _youngest_after(self, reservation: Reservation) -> Reservation | None:
        """Return whom this one may park."""
        candidates = (r for r in reversed(self._running) if r.attempt in self._booked)
        youngest = next(candidates, None)
        return youngest if youngest and youngest.number > reservation.number else None

    def _park(self, reservation: Reservation) -> None:
        """Copy it as far as the step under way reaches; the copy is made after that step, whose token still counts."""
        sequence, hold = reservation.placed
        used = hold.block_ids[: self._pool.blocks_for(sequence.num_launched)]
        self._ranks.order(Park(reservation.attempt, used, sequence.num_launched))
        hold.release()
        reservation.hold = None
        self._running.remove(reservation)
        insort(self._parked, reservation, key=lambda other: other.number)
        self.counters["sequences_parked"] += 1
        self._is_short = True

    def _unpark(self, reservation: Reservation) -> bool:
        sequence = reservation.sequence
        assert sequence is not None
        num_blocks = self._room_for(reservation, sequence.num_launched)
        hold = self._pool.acquire(sequence.block_names, num_blocks)
        if hold is None:
            return False
        sequence.hold = reservation.hold = hold
        self._ranks.order(Unpark(reservation.attempt, hold.block_ids, hold.num_cached * self._pool.block_size))
        self.counters["sequences_unparked"] += 1
        return True
