"""Between a rank's cache and the payloads of frames: gathered with their digests, checked, and scattered.

KVSender gathers and KVReceiver scatters on the rank's main thread; transports wait for payloads to be whole, and check
those that have arrived, on threads of their own. A cache on a GPU is never waited for by the main thread.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from kernels.backend import Operations, operations_for
from kv_transfer.digests import check_payload, check_size, unit_digests, words_digests
from kv_transfer.frames import DigestKind, FrameHeader
from kv_transfer.plan import Part, Piece
from kv_transfer.streams import Afterwards, CudaStreams, Streams
from protocol.layout import Range

Digests = bytes | Callable[[], bytes]
"""Of a payload that is whole in its staging; or what waits until it is and returns them, on any thread."""


class Staging(Protocol):
    """Of one cache: its planes, each [num_layers, num_blocks, num_local_heads, block_size, dim].

    block_table: int64 [num_blocks of the prompt], on the cache's device. heads: of each plane, within the cache.
    """

    digest_kind: DigestKind

    def gather(self, piece: Piece, heads: Sequence[Range], block_table: torch.Tensor, staging: torch.Tensor) -> Digests:
        """Copy a piece out of the cache into staging, uint8 [num_bytes], of the host or of the cache's device.

        The blocks may be written again by whatever is launched after this.
        """
        ...

    def scatter(
        self,
        piece: Piece,
        heads: Sequence[Range],
        block_table: torch.Tensor,
        payload: torch.Tensor,
        done: Callable[[], None],
    ) -> None:
        """Copy a payload that was landed into the cache; done is called, by any thread, when it is not read any more.

        Whatever is launched after this reads what was written.
        """
        ...

    def close(self) -> None:
        """Let go of threads."""
        ...


class HostStaging:
    """A cache in the host's memory: copies are over, and digests computed, when they return."""

    digest_kind: DigestKind = "xxh3"

    def __init__(self, planes: Sequence[torch.Tensor]) -> None:
        self._planes = planes
        self._operations = operations_for(planes[0].device)
        _compile(self._operations, planes, partial(unit_digests, self.digest_kind))

    def gather(self, piece: Piece, heads: Sequence[Range], block_table: torch.Tensor, staging: torch.Tensor) -> Digests:
        self._operations.gather_kv(self._planes, block_table, piece.layers, heads, piece.tokens, staging)
        return unit_digests(self.digest_kind, piece, staging)  # now, while this core's caches hold what it reads

    def scatter(
        self,
        piece: Piece,
        heads: Sequence[Range],
        block_table: torch.Tensor,
        payload: torch.Tensor,
        done: Callable[[], None],
    ) -> None:
        self._operations.scatter_kv(payload, self._planes, block_table, piece.layers, heads, piece.tokens)
        done()

    def close(self) -> None:
        """Nothing is open."""


class DeviceStaging:
    """A cache on a GPU. Payloads are digested there; copies to the host run beside the main stream.

    Raises ValueError for a cache whose rows are no whole words, which cannot be digested there.
    """

    digest_kind: DigestKind = "words"

    def __init__(self, planes: Sequence[torch.Tensor], streams: Streams) -> None:
        self._planes = planes
        self._device = planes[0].device
        self._operations = operations_for(self._device)
        self._streams = streams
        _compile(self._operations, planes, words_digests)
        self._afterwards = Afterwards()

    def gather(self, piece: Piece, heads: Sequence[Range], block_table: torch.Tensor, staging: torch.Tensor) -> Digests:
        gathered = staging if self._is_here(staging) else torch.empty_like(staging, device=self._device)
        self._operations.gather_kv(self._planes, block_table, piece.layers, heads, piece.tokens, gathered)
        digests = words_digests(piece, gathered)
        on_host = torch.empty_like(digests, device="cpu", pin_memory=self._planes[0].is_cuda)

        def copy_out() -> None:
            on_host.copy_(digests, non_blocking=True)
            if gathered is not staging:
                staging.copy_(gathered, non_blocking=True)

        wait = self._streams.aside(copy_out, digests, gathered)
        return lambda: _after(wait, on_host)

    def scatter(
        self,
        piece: Piece,
        heads: Sequence[Range],
        block_table: torch.Tensor,
        payload: torch.Tensor,
        done: Callable[[], None],
    ) -> None:
        self._operations.scatter_kv(payload, self._planes, block_table, piece.layers, heads, piece.tokens)
        self._afterwards.call(self._streams.mark(payload), done)

    def close(self) -> None:
        self._afterwards.close()

    def _is_here(self, staging: torch.Tensor) -> bool:
        return staging.device == self._device


class Landing(Protocol):
    """How a receiving transport checks what has arrived, on its own threads."""

    def land(self, header: FrameHeader, payload: torch.Tensor) -> torch.Tensor:
        """Return the payload, checked, on the cache's device: itself if it is there. Raises FrameError if it is bad."""
        ...


class HostLanding:
    """For a cache in the host's memory."""

    def land(self, header: FrameHeader, payload: torch.Tensor) -> torch.Tensor:
        check_payload(header, payload)
        return payload


class DeviceLanding:
    """For a cache on a GPU: payloads are brought there, and checked there when they were digested on a GPU."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self._device = device
        self._streams = streams

    def land(self, header: FrameHeader, payload: torch.Tensor) -> torch.Tensor:
        check_size(header, payload)
        if header.digest_kind == "xxh3":
            check_payload(header, payload)
            return self._streams.alone(lambda: self._bring(payload))

        def check_there() -> torch.Tensor:
            there = self._bring(payload)
            check_payload(header, there)
            return there

        return self._streams.alone(check_there)

    def _bring(self, payload: torch.Tensor) -> torch.Tensor:
        return payload.to(self._device, non_blocking=True)


def staging_for(planes: Sequence[torch.Tensor]) -> Staging:
    """Return what gathers from and scatters into a cache's planes."""
    return DeviceStaging(planes, CudaStreams(planes[0].device)) if planes[0].is_cuda else HostStaging(planes)


def landing_for(device: torch.device) -> Landing:
    """Return what checks payloads that are meant for a cache on device."""
    return DeviceLanding(device, CudaStreams(device)) if device.type == "cuda" else HostLanding()


def _compile(
    operations: Operations, planes: Sequence[torch.Tensor], digests: Callable[[Piece, torch.Tensor], object]
) -> None:
    """Run every operation once, so that no request waits for one to be compiled; block 0 is left as it is."""
    parts = tuple(Part((0, 1), plane.shape[-1] * plane.itemsize) for plane in planes)
    piece = Piece(0, (0, 1), parts, (0, 1), sum(part.slot_bytes for part in parts))
    block_table = torch.zeros(1, dtype=torch.int64, device=planes[0].device)
    area = block_table, piece.layers, [part.heads for part in parts], piece.tokens
    payload = operations.gather_kv(planes, *area)
    digests(piece, payload)
    operations.scatter_kv(payload, planes, *area)


def _after(wait: Callable[[], None], digests: torch.Tensor) -> bytes:
    wait()
    return digests.numpy().tobytes()
