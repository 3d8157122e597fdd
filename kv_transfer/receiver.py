"""KVReceiver: the decode side of all transfers of one rank.

Owned and called by the rank's main thread, which alone writes to the cache: a frame waits in staging until its header
was compared with this rank's own plan, and only then is copied into blocks that its attempt still owns. Decides nothing
about requests: Received and Broken are facts for the leader.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from kernels.upload import upload
from kv_transfer.frames import FrameHeader
from kv_transfer.plan import FRAME_BYTES, Piece, check_table, frames_of, local_heads, plan_transfer
from kv_transfer.staging import staging_for
from kv_transfer.transports.transport import RECEIVING_FAULTS, Arrival, ReceivingFault, ReceivingTransport
from protocol.identity import Attempt, Epoch
from protocol.layout import KVLayout
from protocol.orders import Broken, ExpectBlocks, Received

POLL_BYTES = 64 << 20
"""What one poll() copies at most (16 ms at the 4 GB/s of one CPU core), so that running streams need not wait long."""

Oddity = Literal["unknown_attempt", "wrong_piece", "duplicate_frame", "reordered_frame"]
ODDITIES: tuple[Oddity, ...] = ("unknown_attempt", "wrong_piece", "duplicate_frame", "reordered_frame")
COUNTERS = (*RECEIVING_FAULTS, *ODDITIES)
"""Every name that KVReceiver.counters can have."""

DAMAGE: tuple[ReceivingFault, ...] = ("bad_digest", "wrong_size")
"""What a second try of the same frame can mend."""

_FrameKey = tuple[int, int]  # source rank, index


@dataclass
class _Transfer:
    """One attempt that is expected: the frames that the plan names for this rank, and those still missing.

    awaited: the number that follows the highest so far, by source rank.
    """

    order: ExpectBlocks
    block_table: torch.Tensor  # [num_blocks of the prompt]
    frames: dict[_FrameKey, tuple[Piece, int]]  # piece, frames of its link
    missing: set[_FrameKey]
    awaited: Counter[int] = field(default_factory=Counter)


class KVReceiver:
    """Checks arriving frames and copies them into the cache.

    planes: of the cache, each [num_layers, num_blocks, num_local_heads, block_size, dim]. fileno() is readable when
    poll() has something to do.
    """

    def __init__(
        self,
        planes: Sequence[torch.Tensor],
        layout: KVLayout,
        rank: int,
        transport: ReceivingTransport,
        frame_bytes: int = FRAME_BYTES,
    ) -> None:
        self._planes = planes
        self._staging = staging_for(planes)
        self._layout = layout
        self._rank = rank
        self._transport = transport
        self._frame_bytes = frame_bytes
        self._transfers: dict[Attempt, _Transfer] = {}
        self._reports: list[Received | Broken] = []
        self._odd: dict[str, int] = dict.fromkeys(ODDITIES, 0)

    @property
    def address(self) -> str:
        """Where source ranks send this rank's frames."""
        return self._transport.address

    @property
    def counters(self) -> dict[str, int]:
        """Frames that were not used, by reason, and those that came out of order; the names are those in COUNTERS."""
        return self._transport.counters | self._odd

    def expect(self, order: ExpectBlocks) -> None:
        """From now on take frames of this attempt; one that cannot work is reported as Broken by the next poll().

        There is always a reason to poll after this: the leader waits to hear that frames may come.
        """
        assert order.attempt not in self._transfers, "an attempt is expected once"
        self._transport.arrivals.ring()
        try:
            frames = self._plan(order)
        except ValueError as error:
            self._reports.append(Broken(self._rank, order.attempt, str(error)))
            return
        [table] = upload([torch.tensor(order.block_ids, dtype=torch.int64)], self._planes[0].device)
        self._transfers[order.attempt] = _Transfer(order, table, frames, set(frames))
        self._finish_if_whole(order.attempt)

    def poll(self, max_bytes: int = POLL_BYTES) -> list[Received | Broken]:
        """Copy what has arrived, about max_bytes at most, and return what has become whole or failed."""
        for arrival in self._transport.arrivals.take(max_bytes):
            if not self._use(arrival):
                arrival.done()
        reports, self._reports = self._reports, []
        return reports

    def drop(self, attempt: Attempt) -> None:
        """Forget an attempt, known or not: after this its blocks are not written again."""
        self._transfers.pop(attempt, None)

    def close_peer(self, epoch: Epoch) -> None:
        """The source group of this epoch is gone: what was not whole yet is Broken."""
        self._transport.close_peer(epoch)
        lost = [attempt for attempt, transfer in self._transfers.items() if transfer.order.source.epoch == epoch]
        for attempt in lost:
            self._fail(attempt, "the source group is gone")
        if lost:
            self._transport.arrivals.ring()

    def fileno(self) -> int:
        return self._transport.arrivals.fileno()

    def close(self) -> None:
        self._transfers.clear()
        self._transport.close()
        self._staging.close()

    def _plan(self, order: ExpectBlocks) -> dict[_FrameKey, tuple[Piece, int]]:
        """Return every frame that this rank must get for order; ValueError when it cannot be."""
        source = order.source.layout
        num_positions = order.first_position + order.num_tokens
        check_table(order.block_ids, self._layout.block_size, self._planes[0].shape[1], num_positions)
        frames: dict[_FrameKey, tuple[Piece, int]] = {}
        for link in plan_transfer(source, self._layout):
            if link.destination_rank == self._rank:
                pieces = frames_of(link, source, order.first_position, order.num_tokens, self._frame_bytes)
                frames |= {(link.source_rank, piece.index): (piece, len(pieces)) for piece in pieces}
        return frames

    def _use(self, arrival: Arrival) -> bool:
        """Copy a frame into its blocks, or refuse it and return False: then its payload has been read for good."""
        header, payload, fault, done = arrival
        transfer = self._transfers.get(header.attempt)
        if transfer is None:
            self._odd["unknown_attempt"] += 1
        elif payload is None and fault not in DAMAGE:  # damage stays missing until its sender sends it again
            self._fail(header.attempt, f"frame {header.piece.index} from rank {header.source_rank}: {fault}")
        elif payload is not None and self._is_wanted(header, transfer):
            self._count_order(header, transfer)
            heads = local_heads(self._layout, self._rank, header.piece)
            self._staging.scatter(header.piece, heads, transfer.block_table, payload, done)
            transfer.missing.remove(_key(header))
            self._finish_if_whole(header.attempt)
            return True
        return False

    def _is_wanted(self, header: FrameHeader, transfer: _Transfer) -> bool:
        """Return whether a frame is in the plan and has not come yet; the first is what every frame must be."""
        key = _key(header)
        if header.destination_rank != self._rank or transfer.frames.get(key) != (header.piece, header.num_frames):
            self._odd["wrong_piece"] += 1
            self._fail(header.attempt, f"frame {header.piece.index} from rank {header.source_rank} is not in the plan")
            return False
        is_missing = key in transfer.missing
        self._odd["duplicate_frame"] += not is_missing
        return is_missing

    def _count_order(self, header: FrameHeader, transfer: _Transfer) -> None:
        """A frame that was overtaken is as good as any: it says itself where it belongs."""
        awaited = transfer.awaited[header.source_rank]
        self._odd["reordered_frame"] += header.number < awaited
        transfer.awaited[header.source_rank] = max(awaited, header.number + 1)

    def _finish_if_whole(self, attempt: Attempt) -> None:
        if not self._transfers[attempt].missing:
            del self._transfers[attempt]
            self._reports.append(Received(self._rank, attempt))

    def _fail(self, attempt: Attempt, reason: str) -> None:
        del self._transfers[attempt]
        self._reports.append(Broken(self._rank, attempt, reason))


def _key(header: FrameHeader) -> _FrameKey:
    return header.source_rank, header.piece.index
