"""Peers in other processes that are killed or stopped in the middle of a transfer: only their own pair suffers."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from protocol.identity import Attempt, new_attempt, new_epoch, new_request_id
from protocol.layout import Endpoint
from protocol.orders import Broken, ExpectBlocks, Received, SendBlocks
from tests.integration.kv_groups import (
    TRANSPORTS,
    Sink,
    Source,
    attempt_between,
    connected,
    expect_order,
    layout,
    poll_for,
    poll_until,
    random_tokens,
    send_order,
    transfer,
)

torch.set_num_threads(1)
transports = pytest.mark.parametrize("name", TRANSPORTS)
signals = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])

PROCESS = """
import select, sys, torch
torch.set_num_threads(1)
from tests.integration.kv_groups import Sink, Source, frames_for, layout, site_of
from kv_transfer.transports.opening import open_sender
from protocol.identity import Attempt
from protocol.layout import Endpoint
from protocol.orders import ExpectBlocks, Received
role, name = sys.argv[1:3]
"""

SENDER = (
    PROCESS
    + """
class Target:
    endpoint = Endpoint(int(sys.argv[5]), layout(1, 2), name, (sys.argv[4],))

source = Source(name, layout(1, 2))
attempt = Attempt(sys.argv[6], 0, int(sys.argv[7]), int(sys.argv[5]), int(sys.argv[8]))
frames = frames_for(source, Target, attempt, [0, 1, 2, 3], 60)
transport = open_sender(name, site_of(layout(1, 2)))
while True:  # everything but the last frame over and over, or everything
    for frame in frames[: len(frames) - (sys.argv[3] == "endless")]:
        transport.send(frame)
        while not transport.settled.take(1):
            select.select([transport.settled], [], [], 1)
"""
)

RECEIVER = (
    PROCESS
    + """
sink = Sink(name, layout(1, 2))
print(sink.epoch, sink.endpoint.addresses[0], flush=True)
words = sys.stdin.readline().split()
attempt = Attempt(words[0], 0, int(words[1]), sink.epoch, int(words[2]))
receiver = sink.receivers[0]
receiver.expect(ExpectBlocks(attempt, Endpoint(int(words[1]), layout(1, 2), name, ("",)), (0, 1, 2, 3), 0, 60))
print("expecting", flush=True)
is_busy = False
while True:
    select.select([receiver], [], [], 1)
    if any(isinstance(report, Received) for report in receiver.poll()):
        print("received", flush=True)
    if not is_busy and receiver.counters["unknown_attempt"] > 3:
        print("busy", flush=True)
        is_busy = True
"""
)


@contextmanager
def running(script: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def receiving_process(name: str, source: Source) -> Iterator[tuple["subprocess.Popen[str]", Endpoint, Attempt]]:
    """A decode rank in a process of its own that expects one attempt."""
    with running(RECEIVER, "decode", name) as process:
        assert process.stdin
        epoch, address = said(process).split(" ", 1)
        endpoint = Endpoint(int(epoch), layout(1, 2), name, (address,))
        attempt = new_attempt(new_request_id(), 0, source.epoch, endpoint.epoch)
        process.stdin.write(f"{attempt.request_id} {attempt.prefill_epoch} {attempt.transfer_id}\n")
        process.stdin.flush()
        assert said(process) == "expecting"
        yield process, endpoint, attempt


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def transfer_among_others(source: Source, sink: Sink) -> list[Broken]:
    """Transfer a prompt between two that are well, within a second; return what else was reported meanwhile."""
    attempt, kv = attempt_between(source, sink), random_tokens(2, 60)
    source.fill([4, 5, 6, 7], kv)
    sink.note([8, 9, 10, 11], 0, kv)
    sink.receivers[0].expect(expect_order(source, attempt, [8, 9, 10, 11], 60))
    began = time.monotonic()
    source.senders[0].send(send_order(sink, attempt, [4, 5, 6, 7], 60))
    others: list[Broken] = []
    while True:
        reports = poll_for([*source.senders, *sink.receivers], 0.02)
        others += [report for report in reports if isinstance(report, Broken)]
        if Received(0, attempt) in reports:
            break
        assert time.monotonic() - began < 1
    assert sink.is_as_expected()
    return others


@transports
@signals
def test_a_receiver_that_dies_or_stops_in_mid_transfer_holds_up_nobody_else(name, how):
    timeout_s = 1.5
    with connected(name, timeout_s=timeout_s) as (source, sink), receiving_process(name, source) as lost:
        transfer(source, sink, 20)  # the pair that is well exists already
        process, endpoint, _ = lost
        sender = source.senders[0]

        def send_some() -> set[Attempt]:
            attempts = {new_attempt(new_request_id(), 0, source.epoch, endpoint.epoch) for _ in range(10)}
            for attempt in attempts:
                sender.send(SendBlocks(attempt, endpoint, (0, 1, 2, 3), 0, 60))
            return attempts

        send_some()
        assert poll_for([sender], 0.3) == []
        assert said(process) == "busy"
        send_some()
        process.send_signal(how)
        attempts = send_some()
        stopped_at = time.monotonic()
        broken = {report.attempt for report in transfer_among_others(source, sink)}
        if how == signal.SIGKILL:
            sender.close_peer(endpoint.epoch)  # as the control plane says
        while not attempts <= broken:
            assert time.monotonic() - stopped_at < timeout_s + 2
            broken |= {report.attempt for report in poll_for([sender], 0.05)}
        process.kill()
        with receiving_process(name, source) as (reborn, reborn_endpoint, attempt):
            sender.send(SendBlocks(attempt, reborn_endpoint, (0, 1, 2, 3), 0, 60))
            assert poll_for([sender], 1.0) == []
            assert said(reborn) == "received"


@transports
@signals
def test_a_sender_that_dies_or_stops_in_mid_transfer_holds_up_nobody_else(name, how):
    with connected(name) as (source, sink):
        transfer(source, sink, 20)
        receiver = sink.receivers[0]

        def expect_from_another_life() -> tuple[Attempt, list[object]]:
            epoch = new_epoch()
            attempt = new_attempt(new_request_id(), 0, epoch, sink.epoch)
            endpoint = msgspec.structs.replace(source.endpoint, epoch=epoch)
            receiver.expect(ExpectBlocks(attempt, endpoint, (0, 1, 2, 3), 0, 60))
            return attempt, [receiver.address, sink.epoch, attempt.request_id, epoch, attempt.transfer_id]

        lost, arguments = expect_from_another_life()
        with running(SENDER, "prefill", name, "endless", *arguments) as process:
            deadline = time.monotonic() + 60
            while receiver.counters["duplicate_frame"] < 3:
                assert time.monotonic() < deadline
                poll_for([receiver], 0.05)
            process.send_signal(how)
            reports = poll_for([receiver], 0.1)  # some transports notice by themselves
            for index, cache in enumerate(sink.caches):
                sink.expected[index] = cache.clone()
            reports += transfer_among_others(source, sink)
            receiver.close_peer(lost.prefill_epoch)
            reports += poll_for([receiver], 0.1)
            assert [(type(report), report.attempt) for report in reports] == [(Broken, lost)]
        again, arguments = expect_from_another_life()
        with running(SENDER, "prefill", name, "whole", *arguments):
            assert poll_until([receiver], 1, deadline_s=60) == [Received(0, again)]


def num_mappings() -> int:
    """How many slabs this process has mapped. They have no name in any file system."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "kv-frames" in line]
    assert all("/memfd:kv-frames (deleted)" in line for line in lines)
    return len(lines)


def test_shared_memory_is_gone_with_its_pair_also_when_the_sender_was_killed():
    before = num_mappings()
    with connected("shm") as (source, sink):
        receiver = sink.receivers[0]
        epoch = new_epoch()
        attempt = new_attempt(new_request_id(), 0, epoch, sink.epoch)
        receiver.expect(
            ExpectBlocks(attempt, msgspec.structs.replace(source.endpoint, epoch=epoch), (0, 1, 2, 3), 0, 60)
        )
        arguments = (receiver.address, sink.epoch, attempt.request_id, epoch, attempt.transfer_id)
        with running(SENDER, "prefill", "shm", "endless", *arguments):
            deadline = time.monotonic() + 60
            while receiver.counters["duplicate_frame"] < 3:
                assert time.monotonic() < deadline
                poll_for([receiver], 0.05)
            assert num_mappings() == before + 1
        transfer(source, sink, 40, blocks=([4, 5, 6], [8, 9, 10]))
        poll_for([receiver], 0.2)
        assert num_mappings() == before + 2, "both ends of the pair that lives, and nothing of the one that was killed"
    gc.collect()
    assert num_mappings() == before
