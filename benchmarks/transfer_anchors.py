"""What the machine and the libraries can do at all, beside which benchmarks/transfer.py shows its transfers.

In one process: memcpy, paged copies, digests. Between two: a plain socket and gloo, each sending one buffer of a
frame's size over and over to a process that does nothing with it. Started as a module, it is that process.
"""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from benchmarks.child_process import child, said
from kernels.backend import operations_for
from kernels.process_group import open_group, open_store
from kv_transfer.digests import unit_digests
from kv_transfer.frames import DigestKind
from kv_transfer.plan import FRAME_BYTES, frames_of, plan_transfer
from kv_transfer.transports.torch.communicator import RECEIVER, SENDER
from protocol.layout import KVLayout

HOST = "127.0.0.1"
TIMEOUT_S = 30.0

Run = Callable[[int], float]
"""Moves the KV of so many tokens once; returns seconds."""

Move = Callable[[int], object]
"""Sends or receives one message of so many bytes, FRAME_BYTES at most."""


def synchronize(device: torch.device) -> None:
    """Wait until everything launched on the device is over."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block_table(num_tokens: int, num_blocks: int, seed: int) -> torch.Tensor:
    """Return scattered blocks, as a pool gives them out after a while."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_blocks, generator=generator)[: num_tokens // 16]


@contextmanager
def memcpy(cache: list[torch.Tensor]) -> Iterator[Run]:
    planes = [(plane.flatten(), torch.zeros_like(plane.flatten())) for plane in cache]
    num_slots = cache[0].shape[1] * cache[0].shape[3]

    def run(num_tokens: int) -> float:
        began = time.perf_counter()
        for plane, target in planes:
            size = plane.numel() // num_slots * num_tokens
            target[:size].copy_(plane[:size])
        synchronize(cache[0].device)
        return time.perf_counter() - began

    yield run


@contextmanager
def paged(cache: list[torch.Tensor]) -> Iterator[Run]:
    """What a transfer does to memory anyway, in pieces of 256 tokens and without processes, digests, or a wire."""
    target, device = [torch.zeros_like(plane) for plane in cache], cache[0].device
    num_layers, num_blocks = cache[0].shape[:2]
    heads = [(0, plane.shape[2]) for plane in cache]
    gather_kv, scatter_kv = operations_for(device).gather_kv, operations_for(device).scatter_kv

    def run(num_tokens: int) -> float:
        ours, theirs = (block_table(num_tokens, num_blocks, seed).to(device) for seed in (1, 2))
        began = time.perf_counter()
        for start in range(0, num_tokens, 256):
            for layer in range(0, num_layers, 4):
                area = (layer, min(layer + 4, num_layers)), heads, (start, min(start + 256, num_tokens))
                scatter_kv(gather_kv(cache, ours, *area), target, theirs, *area)
        synchronize(device)
        return time.perf_counter() - began

    yield run


@contextmanager
def digest(cache: torch.Tensor, shape: KVLayout) -> Iterator[Run]:
    """Digests of one payload over and over, frame by frame: warm, as it is when a transfer has just gathered it."""
    (link,) = plan_transfer(shape, shape)
    kind: DigestKind = "words" if cache.is_cuda else "xxh3"

    def run(num_tokens: int) -> float:
        pieces = frames_of(link, shape, 0, num_tokens)
        payload = cache.flatten()[: FRAME_BYTES // 2].view(torch.uint8)
        began = time.perf_counter()
        for piece in pieces:
            unit_digests(kind, piece, payload[: piece.num_bytes])
        return time.perf_counter() - began

    yield run


@contextmanager
def stream(kind: str, token_bytes: int) -> Iterator[Run]:
    """As many bytes as the KV of so many tokens to another process, over the library of that name."""
    with _OFFERS[kind]() as (port, sender), child("benchmarks.transfer_anchors", kind, port) as process:
        send = sender()

        def run(num_tokens: int) -> float:
            num_bytes = num_tokens * token_bytes
            print(num_bytes, file=process.stdin, flush=True)
            assert said(process) == "ready"
            began = time.perf_counter()
            _move(send, num_bytes)
            assert said(process) == "received"
            return time.perf_counter() - began

        yield run


def _move(move: Move, num_bytes: int) -> None:
    for start in range(0, num_bytes, FRAME_BYTES):
        move(min(FRAME_BYTES, num_bytes - start))


Offer = AbstractContextManager[tuple[int, Callable[[], Move]]]
"""A port where the other process is awaited, and what waits for it and returns how to send."""


@contextmanager
def _offer_tcp() -> Iterator[tuple[int, Callable[[], Move]]]:
    buffer = memoryview(_random_bytes().numpy())
    with socket.create_server((HOST, 0)) as server:

        def sender() -> Move:
            accepted, _ = server.accept()
            return lambda num_bytes: accepted.sendall(buffer[:num_bytes])

        yield server.getsockname()[1], sender


@contextmanager
def _offer_gloo() -> Iterator[tuple[int, Callable[[], Move]]]:
    payload = _random_bytes()
    store = open_store(HOST, 0, is_server=True, timeout_s=TIMEOUT_S)

    def sender() -> Move:
        group = open_group(store, SENDER, 2, HOST, "cpu", TIMEOUT_S)
        return lambda num_bytes: group.send([payload[:num_bytes]], RECEIVER, 0).wait()

    yield store.port, sender


def _random_bytes() -> torch.Tensor:
    return torch.randint(0, 255, (FRAME_BYTES,), dtype=torch.uint8)


_OFFERS: dict[str, Callable[[], Offer]] = {"tcp": _offer_tcp, "gloo": _offer_gloo}


def _join_tcp(port: int) -> Move:
    buffer, stream = bytearray(FRAME_BYTES), socket.create_connection((HOST, port))

    def receive(num_bytes: int) -> None:
        rest = memoryview(buffer)[:num_bytes]
        while rest:
            rest = rest[stream.recv_into(rest) :]

    return receive


def _join_gloo(port: int) -> Move:
    store = open_store(HOST, port, is_server=False, timeout_s=TIMEOUT_S)
    group, payload = open_group(store, RECEIVER, 2, HOST, "cpu", TIMEOUT_S), torch.empty(FRAME_BYTES, dtype=torch.uint8)
    return lambda num_bytes: group.recv([payload[:num_bytes]], SENDER, 0).wait()


_JOINS: dict[str, Callable[[int], Move]] = {"tcp": _join_tcp, "gloo": _join_gloo}


def _receive_all(kind: str, port: int) -> None:
    receive = _JOINS[kind](port)
    for line in sys.stdin:
        print("ready", flush=True)
        _move(receive, int(line))
        print("received", flush=True)


if __name__ == "__main__":
    _receive_all(sys.argv[1], int(sys.argv[2]))
