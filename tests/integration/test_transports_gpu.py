"""nccl and cuda_ipc between two processes on one GPU, held to the rules of the conformance suite.

NCCL takes two ranks on one GPU only if they seem to be on different hosts, and then goes through its sockets. The same
tests run over a CPU's transports everywhere, in a small selection, so that what drives them is known to work. Of those,
the ones whose names end in _gpu stage the KV of a GPU in the host's memory.
"""

import itertools
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.integration import kv_groups
from tests.integration.kv_groups import Source, layout, poll_for
from tests.integration.sink_process import SinkProcess, broken_attempts, sink_process

gpu = pytest.mark.gpu
DIRECT = [pytest.param(name, marks=gpu) for name in ("nccl", "cuda_ipc")]
STAGED = [pytest.param(name, marks=gpu) for name in ("zmq_gpu", "shm_gpu", "gloo_gpu")]
HOST = ["shm"]
transports = pytest.mark.parametrize("name", [*HOST, *DIRECT, *STAGED])


@contextmanager
def on_device(name: str, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> Iterator[tuple[str, SinkProcess]]:
    """Yield a transport's name and a sink in another process, both on the GPU where the name asks for one."""
    is_gpu = name in ("nccl", "cuda_ipc", "auto") or name.endswith("_gpu")
    device = "cuda:0" if is_gpu else "cpu"
    monkeypatch.setattr(kv_groups, "DEVICE", device)
    for variable, value in {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_HOSTID": "source"}.items():
        monkeypatch.setenv(variable, value)
    transport = name.removesuffix("_gpu")
    with sink_process(transport, KV_DEVICE=device, NCCL_HOSTID="sink", **sizes) as sink:
        yield transport, sink


def move_prompts(name: str, sizes: dict[str, int], sources: Iterable[tuple[int, int]], monkeypatch) -> None:
    """From groups of several (tensor-parallel size, block size) to one sink of these sizes."""
    with on_device(name, monkeypatch, **sizes) as (transport, sink):
        seeds = itertools.count(0, 10)
        for source_tp, block_size in sources:
            source = Source(transport, layout(source_tp, sizes["num_kv_heads"], block_size=block_size))
            for num_positions, first in ((37, 0), (71, 32), (100, sizes["block_size"]), (16, 0), (1, 0)):
                assert sink.transfer(source, next(seeds), num_positions, first) == {}
            source.close()


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_every_pair_of_groups_moves_exactly_the_promised_slots(
    name, tensor_parallel, num_kv_heads, block_size, monkeypatch
):
    sizes = {"tensor_parallel": tensor_parallel, "num_kv_heads": num_kv_heads, "block_size": block_size}
    sources = itertools.product((1, 2, 4), (16, 32) if block_size == 16 else (16,))
    move_prompts(name, sizes, sources, monkeypatch)


@transports
def test_prompts_arrive_byte_for_byte(name, monkeypatch):
    sizes = {"tensor_parallel": 4, "num_kv_heads": 8, "block_size": 16}
    move_prompts(name, sizes, [(1, 16), (2, 32)], monkeypatch)


@transports
def test_damage_on_the_way_is_found_and_mended(name, monkeypatch):
    with on_device(name, monkeypatch) as (transport, sink):
        source = Source(transport, layout(1, 2))
        sending = source.senders[0]._transport
        send, damaged = sending.send, []

        def damage_one(frame):
            frame = frame.sealed()
            if not damaged:
                frame.payload[100] ^= 1
                if frame.payload.is_cuda:
                    torch.cuda.synchronize()
                damaged.append(frame)
            send(frame)

        monkeypatch.setattr(sending, "send", damage_one)
        assert sink.transfer(source, 3, 100) == {"bad_digest": 1}
        assert source.senders[0].counters["resent_frames"] == 1
        source.close()


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_dies_or_stops_holds_up_nobody_else_and_its_successor_is_served(name, how, monkeypatch):
    with on_device(name, monkeypatch) as (transport, lost), on_device(name, monkeypatch) as (_, well):
        source = Source(transport, layout(1, 2), timeout_s=3)
        lost.transfer(source, 1, 60)
        well.transfer(source, 2, 60)
        attempt = lost.announce(source, 3, 60)
        lost.process.send_signal(how)
        lost.send(source, attempt, 3, 60)
        if how == signal.SIGKILL:
            source.senders[0].close_peer(lost.epoch)  # as the control plane says
        give_up_at, broken = time.monotonic() + 6, set()
        while attempt not in broken:
            assert time.monotonic() < give_up_at
            broken |= broken_attempts(poll_for([*source.senders], 0.05))
        began = time.monotonic()
        well.transfer(source, 4, 60)
        assert time.monotonic() - began < 2
        lost.process.kill()
        with on_device(name, monkeypatch) as (_, reborn):
            reborn.transfer(source, 5, 60)
        source.close()


@gpu
def test_auto_takes_the_gpus_memory_between_two_processes_on_one_gpu(monkeypatch):
    with on_device("auto", monkeypatch) as (transport, sink):
        source = Source(transport, layout(1, 2))
        sink.transfer(source, 1, 60)
        opened = {name: count for name, count in source.senders[0].counters.items() if count}
        assert opened == {"connections_cuda_ipc": 1}
        source.close()


@gpu
@pytest.mark.parametrize("name", ["cuda_ipc", "zmq_gpu"])
def test_blocks_that_are_overwritten_as_soon_as_they_were_gathered_arrive_as_they_were(name, monkeypatch):
    """The main stream writes into the blocks right after the order to send them, as the next step may."""
    with on_device(name, monkeypatch) as (transport, sink):
        source = Source(transport, layout(1, 2))
        for seed in range(20):
            attempt = sink.announce(source, seed, 200)
            sink.send(source, attempt, seed, 200)
            source.caches[0].fill_(float("nan"))
            is_right, counters, reports = sink.outcome(source)
            assert is_right, reports
            assert counters == {}
        source.close()
