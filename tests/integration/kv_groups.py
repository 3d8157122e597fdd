"""Groups of KV ranks in one process: caches, senders and receivers over real transports, and what must come out.

A cache is one tensor of two planes, keys and values: [2, num_layers, num_blocks, heads, block_size, head_dim]. The
heads of a rank are written down here a second time, from the definition, so that a mistake in the plan shows.
"""

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kv_transfer.mailbox import Mailbox
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.opening import open_receiver, open_sender
from kv_transfer.transports.transport import Destination, OutgoingFrame, Settled, Site
from protocol.identity import Attempt, Epoch, new_attempt, new_epoch, new_request_id
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.orders import Broken, ExpectBlocks, Received, SendBlocks

HOST = "127.0.0.1"
SECRET = b"the tests' own"
DEVICE = os.environ.get("KV_DEVICE", "cpu")
TRANSPORTS = ["zmq", "gloo", "shm", "auto"]
NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, HEAD_DIM = 3, 16, 16, 8
SMALL_FRAME_BYTES = 4096
"""Several frames per link even for tiny caches."""


def layout(tensor_parallel: int, num_kv_heads: int, dtype: str = "float32", block_size: int = BLOCK_SIZE) -> KVLayout:
    return KVLayout("model", NUM_LAYERS, keys_and_values(num_kv_heads, HEAD_DIM, dtype), block_size, tensor_parallel)


def site_of(shape: KVLayout, timeout_s: float = 10, device: str | None = None) -> Site:
    return Site(HOST, torch.device(device or DEVICE), shape, timeout_s, SECRET)


def heads_of(shape: KVLayout, rank: int) -> list[int]:
    num_heads = shape.planes[0].heads
    if shape.tensor_parallel >= num_heads:
        return [rank * num_heads // shape.tensor_parallel]
    width = num_heads // shape.tensor_parallel
    return list(range(rank * width, (rank + 1) * width))


def random_tokens(num_kv_heads: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The KV of a whole prompt: [2, num_layers, num_kv_heads, num_tokens, head_dim]."""
    return torch.randn(2, NUM_LAYERS, num_kv_heads, num_tokens, HEAD_DIM).to(dtype)


def write_tokens(cache: torch.Tensor, shape: KVLayout, rank: int, block_ids: list[int], first: int, kv: torch.Tensor):
    """Put tokens [first, end of kv) of a prompt into a rank's blocks, slot by slot."""
    heads = heads_of(shape, rank)
    for position in range(first, kv.shape[3]):
        block, slot = divmod(position, shape.block_size)
        cache[:, :, block_ids[block], :, slot] = kv[:, :, heads, position]


def random_caches(shape: KVLayout, dtype: torch.dtype = torch.float32, device: str | None = None) -> list[torch.Tensor]:
    sizes = [
        (2, NUM_LAYERS, NUM_BLOCKS, len(heads_of(shape, rank)), shape.block_size, HEAD_DIM)
        for rank in range(shape.tensor_parallel)
    ]
    return [torch.randn(size).to(device or DEVICE, dtype) for size in sizes]


class Source:
    """A prefill group."""

    def __init__(
        self,
        name: str,
        shape: KVLayout,
        dtype: torch.dtype = torch.float32,
        timeout_s: float = 10,
        device: str | None = None,
    ) -> None:
        self.epoch: Epoch = new_epoch()
        self.layout = shape
        self.caches = random_caches(shape, dtype, device)
        self.endpoint = Endpoint(self.epoch, shape, name, ("",) * shape.tensor_parallel)
        self.senders = [
            KVSender(
                cache.unbind(), shape, rank, open_sender(name, site_of(shape, timeout_s, device)), SMALL_FRAME_BYTES
            )  # type: ignore[arg-type]
            for rank, cache in enumerate(self.caches)
        ]

    def fill(self, block_ids: list[int], kv: torch.Tensor) -> None:
        for rank, cache in enumerate(self.caches):
            write_tokens(cache, self.layout, rank, block_ids, 0, kv)

    def close(self) -> None:
        for sender in self.senders:
            sender.close()


class Sink:
    """A decode group, with what its caches must look like."""

    def __init__(
        self,
        name: str,
        shape: KVLayout,
        dtype: torch.dtype = torch.float32,
        timeout_s: float = 10,
        device: str | None = None,
    ) -> None:
        self.epoch: Epoch = new_epoch()
        self.layout = shape
        self.caches = random_caches(shape, dtype, device)
        self.expected = [cache.clone() for cache in self.caches]
        self.receivers = [
            KVReceiver(
                cache.unbind(), shape, rank, open_receiver(name, site_of(shape, timeout_s, device)), SMALL_FRAME_BYTES
            )  # type: ignore[arg-type]
            for rank, cache in enumerate(self.caches)
        ]
        addresses = tuple(receiver.address for receiver in self.receivers)
        self.endpoint = Endpoint(self.epoch, shape, name, addresses)

    def note(self, block_ids: list[int], first: int, kv: torch.Tensor) -> None:
        for rank, cache in enumerate(self.expected):
            write_tokens(cache, self.layout, rank, block_ids, first, kv)

    def is_as_expected(self) -> bool:
        return all(torch.equal(cache, wanted) for cache, wanted in zip(self.caches, self.expected, strict=True))

    def counters(self) -> dict[str, int]:
        """Sums over ranks of those that are not zero."""
        names = self.receivers[0].counters
        sums = {name: sum(receiver.counters[name] for receiver in self.receivers) for name in names}
        return {name: count for name, count in sums.items() if count}

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()


@contextmanager
def connected(
    name: str,
    source_tp: int = 1,
    sink_tp: int = 1,
    num_kv_heads: int = 2,
    dtype: str = "float32",
    timeout_s: float = 10,
    block_sizes: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE),
    devices: tuple[str | None, str | None] = (None, None),
) -> Iterator[tuple[Source, Sink]]:
    kind = getattr(torch, dtype)
    source = Source(name, layout(source_tp, num_kv_heads, dtype, block_sizes[0]), kind, timeout_s, devices[0])
    sink = Sink(name, layout(sink_tp, num_kv_heads, dtype, block_sizes[1]), kind, timeout_s, devices[1])
    try:
        yield source, sink
    finally:
        source.close()
        sink.close()


def attempt_between(source: Source, sink: Sink) -> Attempt:
    return new_attempt(new_request_id(), 0, source.epoch, sink.epoch)


def expect_order(
    source: Source, attempt: Attempt, block_ids: list[int], num_positions: int, first: int = 0
) -> ExpectBlocks:
    return ExpectBlocks(attempt, source.endpoint, tuple(block_ids), first, num_positions - first)


def send_order(sink: Sink, attempt: Attempt, block_ids: list[int], num_positions: int, first: int = 0) -> SendBlocks:
    return SendBlocks(attempt, sink.endpoint, tuple(block_ids), first, num_positions - first)


def poll_until(
    pollables: list[KVSender | KVReceiver], num_reports: int, deadline_s: float = 20
) -> list[Received | Broken]:
    """Sleep on filenos as a worker does, until so many reports have come."""
    reports: list[Received | Broken] = []
    give_up_at = time.monotonic() + deadline_s
    while len(reports) < num_reports:
        assert time.monotonic() < give_up_at, f"only {reports} within {deadline_s} s"
        ready, _, _ = select.select(pollables, [], [], 1)
        for pollable in ready:
            reports += pollable.poll()
    return reports


def poll_for(pollables: list[KVSender | KVReceiver], seconds: float) -> list[Received | Broken]:
    """Poll for a while and return whatever is reported."""
    reports: list[Received | Broken] = []
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select(pollables, [], [], left)
        for pollable in ready:
            reports += pollable.poll()
    return reports


def poll_until_counted(sink: Sink, counters: dict[str, int], deadline_s: float = 20) -> None:
    """Poll until exactly these counters stand; nothing may be reported meanwhile."""
    give_up_at = time.monotonic() + deadline_s
    while sink.counters() != counters:
        assert time.monotonic() < give_up_at, f"{sink.counters()} after {deadline_s} s, not {counters}"
        assert poll_for([*sink.receivers], 0.02) == []


def transfer(
    source: Source, sink: Sink, num_positions: int, first: int = 0, blocks: tuple[list[int], list[int]] | None = None
) -> list[Received | Broken]:
    """Send one prompt's tokens [first, num_positions) over random block tables; return what every sink rank reports."""
    ours, theirs = blocks or (
        torch.randperm(NUM_BLOCKS)[: -(-num_positions // side.layout.block_size)].tolist() for side in (source, sink)
    )
    kv = random_tokens(source.layout.planes[0].heads, num_positions, source.caches[0].dtype)
    source.fill(ours, kv)
    sink.note(theirs, first, kv)
    attempt = attempt_between(source, sink)
    for receiver in sink.receivers:
        receiver.expect(expect_order(source, attempt, theirs, num_positions, first))
    for sender in source.senders:
        sender.send(send_order(sink, attempt, ours, num_positions, first))
    return poll_until([*source.senders, *sink.receivers], len(sink.receivers))


class Recorder:
    """A SendingTransport that keeps every frame and settles what it is told to."""

    def __init__(self) -> None:
        self.settled: Mailbox[Settled] = Mailbox(0)
        self.frames: list[OutgoingFrame] = []
        self.dropped: list[Attempt] = []
        self.counters: dict[str, int] = {}

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, frame: OutgoingFrame) -> None:
        self.frames.append(frame.sealed())

    def drop(self, attempt: Attempt) -> None:
        self.dropped.append(attempt)

    def close_peer(self, epoch: Epoch) -> None:
        pass

    def close(self) -> None:
        self.settled.close()


def frames_for(source: Source, sink: Sink, attempt: Attempt, block_ids: list[int], length: int) -> list[OutgoingFrame]:
    """The frames that rank 0 of source would send, in order, without sending them."""
    recorder = Recorder()
    sender = KVSender(source.caches[0].unbind(), source.layout, 0, recorder, SMALL_FRAME_BYTES)
    sender.send(send_order(sink, attempt, block_ids, length))
    sender.close()
    return recorder.frames
