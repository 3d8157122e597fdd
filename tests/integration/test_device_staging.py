"""The data path of caches on a GPU, which is late wherever CUDA may be: which digests, what is waited for, when.

The device is pretended (tests/pretend_cuda), and so are NCCL and memory that one process opens of another.
"""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kv_transfer.digests import check_payload
from kv_transfer.frames import FrameError
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.staging import staging_for
from kv_transfer.streams import Afterwards, CudaStreams, Wait
from kv_transfer.transports.buffers import Buffers, host_buffers
from kv_transfer.transports.opening import open_receiver
from kv_transfer.transports.transport import Arrival, Destination, OutgoingFrame
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
from tests.pretend_cuda.device import PretendCuda, pretended
from tests.pretend_cuda.links import join_gpus
from tests.pretend_cuda.operations import use_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the place of torch.cuda is taken")
torch.set_num_threads(1)
GPU, CPU = "cuda:0", "cpu"
BOTH = (GPU, GPU)
transports = pytest.mark.parametrize("name", ["zmq", "gloo", "shm"])


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=range(2), autouse=True)
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with pretended(monkeypatch, request.param) as device:
        use_kernels(monkeypatch, device)
        join_gpus(monkeypatch)
        yield device


PATHS = ["zmq", "gloo", "shm", "nccl", "cuda_ipc"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("source_tp", "sink_tp"), [(1, 1), (1, 2), (4, 1)])
def test_kv_of_a_gpu_arrives_byte_for_byte(name, source_tp, sink_tp):
    with connected(name, source_tp, sink_tp, 2, "bfloat16", block_sizes=(16, 32), devices=BOTH) as (source, sink):
        for num_positions, first in ((100, 32), (37, 0), (1, 0)):
            assert {type(report) for report in transfer(source, sink, num_positions, first)} == {Received}
            assert sink.is_as_expected()
        assert not sink.counters()


@transports
@pytest.mark.parametrize("devices", [(GPU, CPU), (CPU, GPU)])
def test_a_gpu_and_a_cpu_understand_one_anothers_digests(name, devices):
    with connected(name, devices=devices) as (source, sink):
        assert type(transfer(source, sink, 100)[0]) is Received
        assert sink.is_as_expected()
        assert not sink.counters()


@pytest.mark.parametrize("name", PATHS)
def test_damage_is_found_by_the_digests_of_a_gpu_and_mended(name, monkeypatch):
    with connected(name, devices=BOTH) as (source, sink):
        transport = source.senders[0]._transport
        send, damaged = transport.send, []

        def damage_one(frame):
            frame = frame.sealed()
            if not damaged:
                frame.payload[77] ^= 4
                torch.cuda.synchronize()
                damaged.append(frame)
            send(frame)

        monkeypatch.setattr(transport, "send", damage_one)
        assert type(transfer(source, sink, 60)[0]) is Received
        assert sink.is_as_expected()
        assert source.senders[0].counters["resent_frames"] == 1
        assert sink.counters() == {"bad_digest": 1}


@pytest.mark.parametrize("name", PATHS)
def test_damage_that_does_not_end_never_reaches_the_cache(name, monkeypatch):
    with connected(name, devices=BOTH) as (source, sink):
        transport = source.senders[0]._transport
        send = transport.send

        def damage(frame):
            frame = frame.sealed()
            frame.payload[0] ^= 1
            torch.cuda.synchronize()
            send(frame)

        monkeypatch.setattr(transport, "send", damage)
        attempt, before = attempt_between(source, sink), sink.caches[0].clone()
        sink.receivers[0].expect(expect_order(source, attempt, [3, 1, 2, 0], 60))
        source.senders[0].send(send_order(sink, attempt, [3, 1, 2, 0], 60))
        assert type(poll_until([*source.senders, *sink.receivers], 1)[0]) is Broken
        assert torch.equal(sink.caches[0], before)


class Handed(Recorder):
    """Keeps frames as they were handed over; their payloads are staged in pinned memory or on the device."""

    def __init__(self, buffers: Buffers) -> None:
        super().__init__()
        self._buffers = buffers

    def staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        return self._buffers.take(num_bytes)

    def send(self, frame: OutgoingFrame) -> None:
        self.frames.append(frame)


@pytest.mark.parametrize("place", ["host", "device"])
def test_what_was_gathered_is_not_what_a_later_step_writes_into_its_blocks(place, cuda):
    shape, gpu = layout(1, 2), torch.device(GPU)
    recorder = Handed(host_buffers(gpu) if place == "host" else Buffers(gpu))
    cache = random_caches(shape, device=GPU)[0]
    before = cache.clone()
    sender = KVSender(cache.unbind(), shape, 0, recorder, SMALL_FRAME_BYTES)
    with connected("zmq") as (source, sink), cuda.timeline.no_waiting():
        sender.send(send_order(sink, attempt_between(source, sink), [5, 2], 32))
        cache.zero_()
    for frame in recorder.frames:
        piece = frame.header.piece
        assert frame.header.unit_digests == b""
        payload = frame.sealed().payload.cpu().view(torch.float32).view(2, piece.layers[1] - piece.layers[0], 2, -1, 8)
        wanted = torch.cat([before[:, :, block].cpu() for block in (5, 2)], dim=3)
        assert torch.equal(payload, wanted[:, slice(*piece.layers), :, slice(*piece.tokens)])
    sender.close()


def test_a_cache_is_left_as_it_was_when_kernels_are_compiled_for_it_and_one_without_whole_words_is_refused():
    cache = random_caches(layout(1, 2), device=GPU)[0]
    before = cache.clone()
    staging_for(cache.unbind()).close()
    assert torch.equal(cache, before)
    with pytest.raises(ValueError, match="no whole words"):
        staging_for([torch.zeros(1, 4, 1, 16, 7, dtype=torch.bfloat16, device=GPU)])


@pytest.mark.parametrize("cuda", [1], indirect=True)  # a device that is in no hurry
def test_memory_for_what_arrives_is_none_that_the_main_stream_is_not_done_with(cuda):
    buffers, link = Buffers(torch.device(GPU)), torch.cuda.Stream()
    for _ in range(20):
        torch.zeros(1000, device=GPU).add_(1)  # as a step's activations, let go of before they are computed
        payload = buffers.take(100)
        with torch.cuda.stream(link):
            payload.fill_(7)
        link.synchronize()
        torch.cuda.synchronize()
        assert payload.tolist() == [7] * 100


def test_a_payload_from_elsewhere_is_in_the_memory_that_ranks_share_before_it_is_announced():
    blocks = [3, 1, 5, 0, 2, 4, 7]
    with connected("cuda_ipc", devices=BOTH) as (source, sink):
        recorder = Handed(Buffers(torch.device(GPU)))
        sender = KVSender(source.caches[0].unbind(), source.layout, 0, recorder, SMALL_FRAME_BYTES)
        attempt = attempt_between(source, sink)
        sink.receivers[0].expect(expect_order(source, attempt, blocks, 110))
        sender.send(send_order(sink, attempt, blocks, 110))
        for frame in recorder.frames:
            source.senders[0]._transport.send(frame)
        assert [type(report) for report in poll_until([*sink.receivers], 1)] == [Received]
        assert not sink.counters()
        sender.close()


def test_memory_is_given_back_when_the_gpu_has_read_it_and_not_when_it_was_told_to():
    over, given_back = threading.Event(), threading.Event()
    afterwards = Afterwards()
    afterwards.call(over.wait, given_back.set)
    time.sleep(0.05)
    assert not given_back.is_set()
    over.set()
    assert given_back.wait(5)
    afterwards.close()


def test_every_payload_is_given_back_once_also_those_that_are_refused():
    with connected("zmq", devices=BOTH) as (source, sink):
        site = site_of(sink.layout, device=GPU)
        receiver = KVReceiver(sink.caches[0].unbind(), sink.layout, 0, open_receiver("zmq", site), 4096)
        recorder = Handed(Buffers(site.device))
        sender = KVSender(source.caches[0].unbind(), source.layout, 0, recorder, SMALL_FRAME_BYTES)
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


def beside_nothing(streams: CudaStreams, work: Callable[[], None], *tensors: torch.Tensor) -> Wait:
    """CudaStreams.aside, but for the wait for what the main stream has still to do."""
    with torch.cuda.stream(streams._copies):
        work()
        for tensor in tensors:
            tensor.record_stream(streams._copies)
        return streams._event(streams._copies).synchronize


def unrecorded(streams: CudaStreams, work: Callable[[], None], *tensors: torch.Tensor) -> Wait:
    """CudaStreams.aside, but nobody hears that its stream still reads the tensors."""
    return _ASIDE(streams, work)


_ASIDE = CudaStreams.aside


@pytest.mark.parametrize("cuda", [1], indirect=True)  # a device that is in no hurry
@pytest.mark.parametrize("plant", [beside_nothing, unrecorded])
def test_a_planted_mistake_is_found_in_some_frame(plant, monkeypatch):
    monkeypatch.setattr(CudaStreams, "aside", plant)
    recorder, shape = Handed(host_buffers(torch.device(GPU))), layout(1, 2)
    with connected("zmq") as (source, sink):
        sender = KVSender(random_caches(shape, device=GPU)[0].unbind(), shape, 0, recorder, SMALL_FRAME_BYTES)
        for _ in range(20):
            sender.send(send_order(sink, attempt_between(source, sink), [5, 2], 32))
        assert any(is_damaged(frame.sealed()) for frame in recorder.frames)
        sender.close()


def is_damaged(frame: OutgoingFrame) -> bool:
    try:
        check_payload(frame.header, frame.payload)
    except FrameError:
        return True
    return False
