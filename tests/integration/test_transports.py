"""Every transport, held to the same rules: KV arrives byte for byte, or nothing of it is ever used."""

import select
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch

from kv_transfer.plan import manifest_of
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.host_identity import host_identity
from kv_transfer.transports.opening import open_receiver, open_sender
from protocol.identity import new_attempt, new_request_id
from protocol.layout import Endpoint, KVLayout, keys_and_values
from protocol.orders import Broken, ExpectBlocks, Received, SendBlocks
from tests.integration.kv_groups import (
    SMALL_FRAME_BYTES,
    TRANSPORTS,
    attempt_between,
    connected,
    expect_order,
    poll_for,
    poll_until,
    random_tokens,
    send_order,
    site_of,
    transfer,
)
from tests.integration.test_process_group import LOOPBACK, listening_hosts, num_threads

torch.set_num_threads(1)
transports = pytest.mark.parametrize("name", TRANSPORTS)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


# Which heads and slots go where is proven purely, in test_plan.py; here each kind of split crosses once.
SPLITS = [(1, 1, 2, (16, 16)), (2, 1, 8, (16, 32)), (1, 4, 8, (32, 16)), (2, 4, 2, (16, 16)), (4, 2, 1, (16, 16))]


@transports
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"{split[0]}to{split[1]}-{split[2]}heads")
def test_every_pair_of_groups_moves_exactly_the_promised_slots(name, split):
    source_tp, sink_tp, num_kv_heads, block_sizes = split
    with connected(name, source_tp, sink_tp, num_kv_heads, block_sizes=block_sizes) as (source, sink):
        for num_positions, first in ((37, 0), (71, 32), (100, block_sizes[1]), (16, 0), (1, 0)):
            reports = transfer(source, sink, num_positions, first)
            assert sorted(report.rank for report in reports) == list(range(sink_tp))
            assert {type(report) for report in reports} == {Received}
            assert sink.is_as_expected()
        assert not sink.counters()


@transports
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_arrives_bit_for_bit(name, dtype):
    with connected(name, 2, 1, 4, dtype) as (source, sink):
        assert type(transfer(source, sink, 150)[0]) is Received
        assert sink.is_as_expected()


@transports
def test_many_transfers_at_once_do_not_mix(name):
    with connected(name, 2, 2, 2) as (source, sink):
        kv = [random_tokens(2, 30) for _ in range(8)]
        attempts = [attempt_between(source, sink) for _ in kv]
        for index, (attempt, tokens) in enumerate(zip(attempts, kv, strict=True)):
            blocks = [2 * index, 2 * index + 1]
            source.fill(blocks, tokens)
            sink.note(blocks[::-1], 0, tokens)
            for receiver in sink.receivers:
                receiver.expect(expect_order(source, attempt, blocks[::-1], 30))
        for index, attempt in reversed(list(enumerate(attempts))):
            for sender in source.senders:
                sender.send(send_order(sink, attempt, [2 * index, 2 * index + 1], 30))
        reports = poll_until([*source.senders, *sink.receivers], 16)
        assert {(report.rank, report.attempt) for report in reports} == {(r, a) for r in (0, 1) for a in attempts}
        assert sink.is_as_expected()


@transports
def test_frames_of_full_size_arrive(name):
    shape = KVLayout("large", 6, keys_and_values(4, 64, "float32"), 16, 1)
    source, sink = torch.randn(2, 6, 80, 4, 16, 64), torch.zeros(2, 6, 80, 4, 16, 64)
    sender = KVSender(source.unbind(), shape, 0, open_sender(name, site_of(shape)))
    receiver = KVReceiver(sink.unbind(), shape, 0, open_receiver(name, site_of(shape)))
    attempt = new_attempt("0" * 32, 0, 1, 2)
    manifest = manifest_of(shape, shape, 16, 1200)
    assert manifest.num_bytes / manifest.num_frames > 2 << 20
    table = torch.randperm(80)
    receiver.expect(ExpectBlocks(attempt, Endpoint(1, shape, name, ("",)), tuple(table.tolist()), 16, 1200))
    sender.send(SendBlocks(attempt, Endpoint(2, shape, name, (receiver.address,)), tuple(range(80)), 16, 1200))
    assert poll_until([sender, receiver], 1) == [Received(0, attempt)]
    assert torch.equal(sink[:, :, table[1:76]], source[:, :, 1:76])
    assert not sink[:, :, table[0]].any()
    assert not sink[:, :, table[76:]].any()
    sender.close()
    receiver.close()


@transports
def test_a_receiver_that_is_busy_for_seconds_loses_nothing(name, monkeypatch):
    monkeypatch.setattr("kv_transfer.transports.opening.INBOX_BYTES", 8 << 20)
    shape = KVLayout("large", 20, keys_and_values(4, 64, "float32"), 16, 1)
    source, sink = torch.ones(2, 20, 80, 4, 16, 64), torch.zeros(2, 20, 80, 4, 16, 64)
    sender = KVSender(source.unbind(), shape, 0, open_sender(name, site_of(shape)))
    receiver = KVReceiver(sink.unbind(), shape, 0, open_receiver(name, site_of(shape)))
    attempt = new_attempt("0" * 32, 0, 1, 2)
    receiver.expect(ExpectBlocks(attempt, Endpoint(1, shape, name, ("",)), tuple(range(80)), 0, 1280))
    sender.send(SendBlocks(attempt, Endpoint(2, shape, name, (receiver.address,)), tuple(range(80)), 0, 1280))
    assert poll_for([sender], 3.5) == []  # longer than a heartbeat of the control plane waits
    assert poll_until([sender, receiver], 1) == [Received(0, attempt)]
    assert torch.equal(sink, source)
    sender.close()
    receiver.close()


@transports
def test_nothing_listens_on_other_interfaces(name):
    before = listening_hosts()  # other tests of this process may have left a store
    with connected(name, 2, 2) as (source, sink):
        transfer(source, sink, 40)
        assert listening_hosts() == before | (set() if name == "shm" else {LOOPBACK})


@transports
def test_a_closed_transport_leaves_no_thread_and_no_file_behind(name):
    def usage() -> tuple[int, int]:
        return num_threads(), len(list(Path("/proc/self/fd").iterdir()))

    with connected(name, 2, 2) as groups:
        transfer(*groups, 40)
    del groups
    before = usage()
    for _ in range(3):
        with connected(name, 2, 2) as groups:
            transfer(*groups, 40)
        del groups
    deadline = time.monotonic() + 5
    while usage() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    after = usage()
    assert after[0] <= before[0]
    assert after[1] <= before[1]


@transports
def test_a_transfer_of_no_tokens_is_received_at_once(name):
    with connected(name) as (source, sink):
        attempt = attempt_between(source, sink)
        sink.receivers[0].expect(expect_order(source, attempt, [3, 4], 32, first=32))
        assert poll_until([*sink.receivers], 1, deadline_s=1) == [Received(0, attempt)]
        source.senders[0].send(send_order(sink, attempt, [3, 4], 32, first=32))
        assert poll_for([*source.senders, *sink.receivers], 0.1) == []


@transports
def test_one_poll_copies_no_more_than_its_budget(name):
    with connected(name) as (source, sink):
        attempt = attempt_between(source, sink)
        receiver = sink.receivers[0]
        receiver.expect(expect_order(source, attempt, [1, 2, 3, 4], 64))
        source.senders[0].send(send_order(sink, attempt, [1, 2, 3, 4], 64))
        polls = 0
        reports: list[Received | Broken] = []
        while not reports:
            assert select.select([receiver], [], [], 5)[0], "a poll with work left to do is announced"
            reports = receiver.poll(max_bytes=1)
            polls += 1
        assert polls >= manifest_of(source.layout, sink.layout, 0, 64, SMALL_FRAME_BYTES).num_frames > 3


@transports
def test_two_decode_groups_that_one_prefill_group_fetches_from_have_a_connection_each(name):
    with connected(name) as (first, prefill), connected(name) as (second, _):
        for decode in (first, second, first, second):
            attempt, kv = new_attempt(new_request_id(), 0, prefill.epoch, decode.epoch), random_tokens(2, 40)
            decode.fill([1, 2, 3], kv)
            prefill.note([4, 5, 6], 0, kv)
            prefill.receivers[0].expect(expect_order(decode, attempt, [4, 5, 6], 40))
            decode.senders[0].send(send_order(prefill, attempt, [1, 2, 3], 40))
            assert poll_until([*decode.senders, *prefill.receivers], 1) == [Received(0, attempt)]
            assert prefill.is_as_expected()
        opened = [decode.senders[0].counters for decode in (first, second)]
        assert [sum(n for key, n in each.items() if key.startswith("connections_")) for each in opened] == [1, 1]


def test_a_decode_group_that_is_gone_leaves_no_thread_with_the_prefill_group_that_fetched_from_it():
    with connected("gloo") as (decode, prefill):
        attempt = new_attempt(new_request_id(), 0, prefill.epoch, decode.epoch)
        prefill.receivers[0].expect(expect_order(decode, attempt, [1, 2], 20))
        decode.senders[0].send(send_order(prefill, attempt, [1, 2], 20))
        assert poll_until([*decode.senders, *prefill.receivers], 1) == [Received(0, attempt)]
        [served] = [each for each in threading.enumerate() if each.name == "kv-pair-receiver"]
        prefill.receivers[0].close_peer(decode.epoch)
        served.join(5)
        assert not served.is_alive()


def test_auto_takes_shared_memory_on_one_host_and_zmq_where_it_does_not_reach():
    with connected("auto") as (source, sink), connected("auto") as (_, far_sink):
        transfer(source, sink, 40)
        (sender,), (receiver,) = source.senders, far_sink.receivers
        assert sender.counters == {"connections_shm": 1, "connections_zmq": 0, "resent_frames": 0}
        host = host_identity()
        assert host in receiver.address
        elsewhere = receiver.address.replace(host, "another-host")
        far_sink.endpoint = msgspec.structs.replace(far_sink.endpoint, addresses=(elsewhere,))
        assert type(transfer(source, far_sink, 40)[0]) is Received
        assert far_sink.is_as_expected()
        assert sender.counters == {"connections_shm": 1, "connections_zmq": 1, "resent_frames": 0}


def test_a_sender_of_one_named_transport_reaches_a_receiver_that_offers_several():
    for name in ("zmq", "shm"):
        with connected(name) as (source, _), connected("auto") as (_, sink):
            assert type(transfer(source, sink, 40)[0]) is Received
            assert sink.is_as_expected()
