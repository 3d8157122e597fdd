"""The data path of caches on a GPU, with everything but the GPU itself: which digests, what is waited for, and when."""

import threading
import time

import pytest
import torch

from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.streams import Afterwards
from kv_transfer.transports.opening import open_receiver
from kv_transfer.transports.transport import Arrival
from protocol.orders import Broken, Received
from tests.integration.kv_groups import (
    SMALL_FRAME_BYTES,
    Recorder,
    attempt_between,
    connected,
    expect_order,
    layout,
    poll_for,
    poll_until,
    random_caches,
    send_order,
    site_of,
    transfer,
)
from tests.integration.lazy_streams import CopyingStaging, DirectStaging, play_gpu

torch.set_num_threads(1)
transports = pytest.mark.parametrize("name", ["zmq", "gloo", "shm"])


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


PATHS = {"zmq": False, "gloo": False, "shm": False, "nccl": True, "cuda_ipc": True}
"""Whether payloads stay on the GPU."""


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("source_tp", "sink_tp"), [(1, 1), (1, 2), (4, 1)])
def test_kv_of_a_gpu_arrives_byte_for_byte(name, source_tp, sink_tp, monkeypatch):
    play_gpu(monkeypatch, is_direct=PATHS[name])
    with connected(name, source_tp, sink_tp, 2, "bfloat16", block_sizes=(16, 32)) as (source, sink):
        for num_positions, first in ((100, 32), (37, 0), (1, 0)):
            assert {type(report) for report in transfer(source, sink, num_positions, first)} == {Received}
            assert sink.is_as_expected()
        assert not sink.counters()


@transports
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_gpu_and_a_cpu_understand_one_anothers_digests(name, side, monkeypatch):
    play_gpu(monkeypatch, is_direct=False, sides=side)
    with connected(name) as (source, sink):
        assert type(transfer(source, sink, 100)[0]) is Received
        assert sink.is_as_expected()
        assert not sink.counters()


@pytest.mark.parametrize("name", PATHS)
def test_damage_is_found_by_the_digests_of_a_gpu_and_mended(name, monkeypatch):
    play_gpu(monkeypatch, is_direct=PATHS[name])
    with connected(name) as (source, sink):
        transport = source.senders[0]._transport
        send, damaged = transport.send, []

        def damage_one(frame):
            frame = frame.sealed()
            if not damaged:
                frame.payload[77] ^= 4
                damaged.append(frame)
            send(frame)

        monkeypatch.setattr(transport, "send", damage_one)
        assert type(transfer(source, sink, 60)[0]) is Received
        assert sink.is_as_expected()
        assert source.senders[0].counters["resent_frames"] == 1
        assert sink.counters() == {"bad_digest": 1}


@pytest.mark.parametrize("name", PATHS)
def test_damage_that_does_not_end_never_reaches_the_cache(name, monkeypatch):
    play_gpu(monkeypatch, is_direct=PATHS[name])
    with connected(name) as (source, sink):
        transport = source.senders[0]._transport
        send = transport.send

        def damage(frame):
            frame = frame.sealed()
            frame.payload[0] ^= 1
            send(frame)

        monkeypatch.setattr(transport, "send", damage)
        attempt, before = attempt_between(source, sink), sink.caches[0].clone()
        sink.receivers[0].expect(expect_order(source, attempt, [3, 1, 2, 0], 60))
        source.senders[0].send(send_order(sink, attempt, [3, 1, 2, 0], 60))
        assert type(poll_until([*source.senders, *sink.receivers], 1)[0]) is Broken
        assert torch.equal(sink.caches[0], before)


@pytest.mark.parametrize("staging", [CopyingStaging, DirectStaging])
def test_what_was_gathered_is_not_what_a_later_step_writes_into_its_blocks(staging, monkeypatch):
    monkeypatch.setattr("kv_transfer.sender.staging_for", staging)
    shape, recorder = layout(1, 2), Recorder()
    monkeypatch.setattr(recorder, "send", recorder.frames.append)  # as it was handed over
    cache = random_caches(shape)[0]
    before = cache.clone()
    sender = KVSender(cache, shape, 0, recorder, SMALL_FRAME_BYTES)
    with connected("zmq") as (source, sink):
        sender.send(send_order(sink, attempt_between(source, sink), [5, 2], 32))
    cache.zero_()
    for frame in recorder.frames:
        piece = frame.header.piece
        assert frame.header.unit_digests == b""
        payload = frame.sealed().payload.view(torch.float32).view(*(b - a for a, b in [piece.layers]), 2, 2, -1, 8)
        wanted = torch.cat([before[:, :, block] for block in (5, 2)], dim=3)
        assert torch.equal(payload, wanted[slice(*piece.layers), :, :, slice(*piece.tokens)])
    sender.close()


def test_a_cache_is_left_as_it_was_when_kernels_are_compiled_for_it_and_one_without_whole_words_is_refused():
    cache = random_caches(layout(1, 2))[0]
    before = cache.clone()
    DirectStaging(cache).close()
    assert torch.equal(cache, before)
    with pytest.raises(ValueError, match="no whole words"):
        DirectStaging(torch.zeros(1, 2, 4, 1, 16, 7, dtype=torch.bfloat16))


def test_memory_is_given_back_when_the_gpu_has_read_it_and_not_when_it_was_told_to():
    over, given_back = threading.Event(), threading.Event()
    afterwards = Afterwards()
    afterwards.call(over.wait, given_back.set)
    time.sleep(0.05)
    assert not given_back.is_set()
    over.set()
    assert given_back.wait(5)
    afterwards.close()


def test_every_payload_is_given_back_once_also_those_that_are_refused(monkeypatch):
    monkeypatch.setattr("kv_transfer.receiver.staging_for", DirectStaging)
    with connected("zmq") as (source, sink):
        receiver = KVReceiver(sink.caches[0], sink.layout, 0, open_receiver("zmq", site_of(sink.layout)), 4096)
        recorder = Recorder()
        sender = KVSender(source.caches[0], source.layout, 0, recorder, SMALL_FRAME_BYTES)
        attempt = attempt_between(source, sink)
        receiver.expect(expect_order(source, attempt, [1, 2], 32))
        sender.send(send_order(sink, attempt, [1, 2], 32))
        done: list[int] = []
        arrivals = [*recorder.frames, recorder.frames[0]]  # and one of no live attempt
        for index, frame in enumerate(arrivals):
            arrival = Arrival(frame.header, frame.payload, None, lambda index=index: done.append(index))
            receiver._transport.arrivals.put(arrival)
        assert [type(report) for report in poll_until([receiver], 1)] == [Received]
        poll_for([receiver], 0.05)
        receiver.close()
        assert sorted(done) == list(range(len(arrivals)))
        sender.close()
