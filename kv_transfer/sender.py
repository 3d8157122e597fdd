"""KVSender: the prefill side of all transfers of one rank.

Owned and called by the rank's main thread, which alone reads the cache. Blocks may be reused as soon as their attempt
was dropped, or every destination has committed: what was gathered is a copy. Decides nothing about requests.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from kernels.upload import upload
from kv_transfer.frames import FrameHeader
from kv_transfer.plan import FRAME_BYTES, Piece, check_table, frames_of, local_heads, plan_transfer
from kv_transfer.staging import staging_for
from kv_transfer.transports.transport import DROPPED, REFUSED, Destination, OutgoingFrame, SendingTransport, Settled
from protocol.identity import Attempt, Epoch
from protocol.layout import KVLayout
from protocol.orders import Broken, SendBlocks, SendMore

WINDOW_BYTES = 64 << 20
"""Gathered payloads per destination that the peer has not checked yet. Later pieces wait in the cache until poll()."""

MAX_RESENDS = 2
"""How often one frame that arrived damaged is gathered and sent again, before its transfer is Broken."""


@dataclass
class _Transfer:
    """One attempt under way: where its blocks are, and how many of its frames are not settled yet.

    uncomputed: frames that are not computed yet, which wait for nothing else; num_computed: positions that are, in all
    layers.
    """

    order: SendBlocks
    block_table: torch.Tensor  # [num_blocks of the prompt]
    num_unsettled: int = 0
    num_computed: int = 0
    uncomputed: list[tuple[Destination, FrameHeader]] = field(default_factory=list)
    num_sent: Counter[Destination] = field(default_factory=Counter)
    num_resends: Counter[tuple[Destination, int]] = field(default_factory=Counter)  # of each frame

    def is_computed(self, piece: Piece, more: SendMore) -> bool:
        """Whether a piece may leave, after what more says."""
        if piece.tokens[1] <= self.num_computed:
            return True
        is_layer_there = more.num_layers is None or piece.layers[1] <= more.num_layers
        return is_layer_there and piece.tokens[1] <= more.num_computed


@dataclass
class _Lane:
    """What waits for one destination, oldest first, and how many gathered bytes are on their way there."""

    waiting: deque[FrameHeader] = field(default_factory=deque)
    staged_bytes: int = 0


class KVSender:
    """Gathers pieces of the cache and hands them to a transport, without ever waiting for the network.

    Memory is bounded by WINDOW_BYTES per destination rank: send() gathers what fits, poll() the rest as frames are
    settled, so a stalled destination holds up nobody but itself. fileno() is readable when poll() has something to do.

    planes: of the cache, each [num_layers, num_blocks, num_local_heads, block_size, dim].
    """

    def __init__(
        self,
        planes: Sequence[torch.Tensor],
        layout: KVLayout,
        rank: int,
        transport: SendingTransport,
        frame_bytes: int = FRAME_BYTES,
    ) -> None:
        self._planes = planes
        self._staging = staging_for(planes)
        self._layout = layout
        self._rank = rank
        self._transport = transport
        self._frame_bytes = frame_bytes
        self._transfers: dict[Attempt, _Transfer] = {}
        self._lanes: dict[Destination, _Lane] = {}
        self._reports: list[Broken] = []
        self._num_resent = 0

    @property
    def counters(self) -> dict[str, int]:
        """Connections opened, by transport, and frames that were sent once more because they arrived damaged."""
        return {**self._transport.counters, "resent_frames": self._num_resent}

    def send(self, order: SendBlocks) -> None:
        """Start this rank's part of a transfer; one that cannot work is reported as Broken by the next poll()."""
        assert order.attempt not in self._transfers, "an attempt is sent once"
        try:
            headers = self._headers(order)
        except ValueError as error:
            self._reports.append(Broken(self._rank, order.attempt, str(error)))
            self._transport.settled.ring()
            return
        if headers:
            [table] = upload([torch.tensor(order.block_ids, dtype=torch.int64)], self._planes[0].device)
            self._transfers[order.attempt] = _Transfer(order, table, len(headers), uncomputed=headers)
            end = order.first_position + order.num_tokens
            self.send_more(SendMore(order.attempt, end if order.num_computed is None else order.num_computed))

    def send_more(self, order: SendMore) -> None:
        """Send those frames of a transfer that are computed now; one that failed or was dropped has none."""
        transfer = self._transfers.get(order.attempt)
        if transfer is None:
            return
        if order.num_layers is None:
            transfer.num_computed = order.num_computed
        waiting, transfer.uncomputed = transfer.uncomputed, []
        for destination, header in waiting:
            if transfer.is_computed(header.piece, order):
                self._lanes.setdefault(destination, _Lane()).waiting.append(header)
            else:
                transfer.uncomputed.append((destination, header))
        self._fill_lanes()

    def poll(self) -> list[Broken]:
        """Take note of what the transport did, gather what there is room for now, and return what has failed."""
        for settled in self._transport.settled.take(1):
            self._settle(settled)
        self._fill_lanes()
        reports, self._reports = self._reports, []
        return reports

    def drop(self, attempt: Attempt) -> None:
        """Forget an attempt, known or not: after this its blocks are not read again."""
        if self._transfers.pop(attempt, None):
            self._transport.drop(attempt)
            self._fill_lanes()

    def close_peer(self, epoch: Epoch) -> None:
        """The destination group of this epoch is gone: what was on its way there is Broken."""
        lost = [attempt for attempt, transfer in self._transfers.items() if transfer.order.destination.epoch == epoch]
        for attempt in lost:
            self._fail(attempt, "the destination group is gone")
        if lost:
            self._transport.settled.ring()
        self._lanes = {key: lane for key, lane in self._lanes.items() if key.epoch != epoch}
        self._transport.close_peer(epoch)

    def fileno(self) -> int:
        return self._transport.settled.fileno()

    def close(self) -> None:
        self._transfers.clear()
        self._lanes.clear()
        self._transport.close()
        self._staging.close()

    def _headers(self, order: SendBlocks) -> list[tuple[Destination, FrameHeader]]:
        """Plan this rank's frames; the digests are filled in when the payloads have been gathered."""
        num_ranks, num_addresses = order.destination.layout.tensor_parallel, len(order.destination.addresses)
        if num_addresses != num_ranks:
            raise ValueError(f"the destination group has {num_ranks} ranks but {num_addresses} addresses")
        num_positions = order.first_position + order.num_tokens
        check_table(order.block_ids, self._layout.block_size, self._planes[0].shape[1], num_positions)
        kind, headers = self._staging.digest_kind, []
        for link in plan_transfer(self._layout, order.destination.layout):
            if link.source_rank == self._rank:
                rank = link.destination_rank
                destination = Destination(order.destination.epoch, order.destination.addresses[rank])
                pieces = frames_of(link, self._layout, order.first_position, order.num_tokens, self._frame_bytes)
                headers += [
                    (destination, FrameHeader(order.attempt, self._rank, rank, len(pieces), piece, kind, b""))
                    for piece in pieces
                ]
        return headers

    def _fill_lanes(self) -> None:
        for destination, lane in list(self._lanes.items()):
            self._fill(destination, lane)
            if not lane.waiting and not lane.staged_bytes:
                del self._lanes[destination]

    def _fill(self, destination: Destination, lane: _Lane) -> None:
        """Gather and hand over what waits, oldest first, up to the window; frames of dropped attempts are skipped."""
        while lane.waiting:
            header = lane.waiting[0]
            transfer = self._transfers.get(header.attempt)
            if transfer:
                room = self._room(destination, lane, header.piece.num_bytes)
                if room is None:
                    return
                heads = local_heads(self._layout, self._rank, header.piece)
                digests = self._staging.gather(header.piece, heads, transfer.block_table, room)
                lane.staged_bytes += header.piece.num_bytes  # not before: for a gather, memory may have run out
                numbered = msgspec.structs.replace(header, number=transfer.num_sent[destination])
                transfer.num_sent[destination] += 1
                self._transport.send(OutgoingFrame(destination, numbered, room, digests))
            lane.waiting.popleft()

    def _room(self, destination: Destination, lane: _Lane, num_bytes: int) -> torch.Tensor | None:
        if lane.staged_bytes and lane.staged_bytes + num_bytes > WINDOW_BYTES:
            return None
        return self._transport.staging(destination, num_bytes)

    def _settle(self, settled: Settled) -> None:
        frame, fault = settled
        lane = self._lanes.get(frame.destination)
        if lane:
            lane.staged_bytes -= frame.header.piece.num_bytes
            if fault and fault != DROPPED and not fault.startswith(REFUSED):
                self._give_up(lane, fault)
        transfer = self._transfers.get(frame.header.attempt)
        if transfer is None or fault == DROPPED:
            return
        if fault and fault.startswith(REFUSED) and lane and self._may_resend(transfer, frame):
            lane.waiting.appendleft(frame.header)
            return
        if fault:
            self._fail(frame.header.attempt, fault)
            return
        transfer.num_unsettled -= 1
        if not transfer.num_unsettled:
            del self._transfers[frame.header.attempt]

    def _may_resend(self, transfer: _Transfer, frame: OutgoingFrame) -> bool:
        """Its blocks are still held, so what arrived damaged can be gathered once more."""
        key = frame.destination, frame.header.piece.index
        if transfer.num_resends[key] >= MAX_RESENDS:
            return False
        transfer.num_resends[key] += 1
        self._num_resent += 1
        return True

    def _give_up(self, lane: _Lane, fault: str) -> None:
        """The connection failed: what waits for it must not wait for another one's deadline."""
        for attempt in {header.attempt for header in lane.waiting} & self._transfers.keys():
            self._fail(attempt, fault)

    def _fail(self, attempt: Attempt, reason: str) -> None:
        del self._transfers[attempt]
        self._transport.drop(attempt)
        self._reports.append(Broken(self._rank, attempt, reason))
