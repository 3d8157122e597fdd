"""Every transport under orders that cannot work and peers that go away: Broken with a reason, and nobody is held up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch

from kv_transfer.transports.slab.factories import host_reach
from kv_transfer.transports.slab.reach import listening_here
from kv_transfer.transports.tcp.address import address_of, listening_on
from protocol.identity import new_epoch
from protocol.layout import Endpoint
from protocol.orders import Broken, ExpectBlocks, Received
from tests.integration.kv_groups import (
    HOST,
    TRANSPORTS,
    attempt_between,
    connected,
    expect_order,
    layout,
    poll_for,
    poll_until,
    send_order,
    transfer,
)

torch.set_num_threads(1)
transports = pytest.mark.parametrize("name", TRANSPORTS)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@contextmanager
def deaf_address(name: str) -> Iterator[str]:
    """Where a peer connects and is never answered."""
    if name in ("shm", "auto"):
        with listening_here() as deaf:
            yield f"shm={host_reach().address_of(deaf)} zmq=tcp://{HOST}:1"
        return
    with listening_on(HOST) as deaf:
        yield address_of(deaf)


@transports
def test_orders_that_cannot_work_are_reported_as_broken_with_the_reason(name):
    with connected(name) as (source, sink):
        attempt = attempt_between(source, sink)
        other = Endpoint(source.epoch, msgspec.structs.replace(layout(1, 2), num_layers=9), name, ("",))
        receiver, sender = sink.receivers[0], source.senders[0]
        cases = [
            (ExpectBlocks(attempt, other, (1,), 0, 16), "num_layers differs"),
            (ExpectBlocks(attempt, source.endpoint, (1,), 0, 17), "cannot hold 17 tokens"),
            (ExpectBlocks(attempt, source.endpoint, (99,), 0, 16), "block 99 does not exist"),
        ]
        for order, reason in cases:
            receiver.expect(order)
            (report,) = poll_until([receiver], 1, deadline_s=1)
            assert isinstance(report, Broken)
            assert reason in report.reason
        sender.send(send_order(sink, attempt, [99], 16))
        (report,) = poll_until([sender], 1, deadline_s=1)
        assert isinstance(report, Broken)
        assert "block 99" in report.reason


@transports
def test_a_destination_that_never_answers_breaks_the_transfer_in_time(name):
    with connected(name, timeout_s=0.5) as (source, sink), deaf_address(name) as address:
        endpoint = Endpoint(new_epoch(), sink.layout, name, (address,))
        attempt = attempt_between(source, sink)
        began = time.monotonic()
        source.senders[0].send(msgspec.structs.replace(send_order(sink, attempt, [1], 16), destination=endpoint))
        assert time.monotonic() - began < 0.3, "send does not wait for the network"
        (report,) = poll_until([*source.senders], 1)
        assert isinstance(report, Broken)
        assert report.attempt == attempt
        assert time.monotonic() - began < 3
        assert type(transfer(source, sink, 40)[0]) is Received


@transports
def test_closing_a_peer_breaks_what_is_under_way_and_nothing_else(name):
    with connected(name) as (source, sink), connected(name) as (other_source, other_sink):
        lost, kept = attempt_between(source, sink), attempt_between(other_source, sink)
        receiver = sink.receivers[0]
        receiver.expect(expect_order(source, lost, [1, 2], 32))
        receiver.expect(expect_order(other_source, kept, [3, 4], 32))
        receiver.close_peer(source.epoch)
        assert [(type(report), report.attempt) for report in poll_until([receiver], 1)] == [(Broken, lost)]
        other_source.senders[0].send(send_order(sink, kept, [5, 6], 32))
        assert poll_until([receiver, *other_source.senders], 1) == [Received(0, kept)]

        nowhere = Endpoint(new_epoch(), sink.layout, name, (f"tcp://{HOST}:1",))
        attempt = attempt_between(source, other_sink)
        source.senders[0].send(msgspec.structs.replace(send_order(sink, attempt, [1], 16), destination=nowhere))
        source.senders[0].close_peer(nowhere.epoch)
        assert [report.attempt for report in poll_until([*source.senders], 1)] == [attempt]
        assert type(transfer(source, other_sink, 40)[0]) is Received


@transports
def test_a_sender_that_dropped_an_attempt_forgets_it(name):
    with connected(name) as (source, sink):
        nowhere = Endpoint(new_epoch(), sink.layout, name, (f"tcp://{HOST}:1",))
        attempt = attempt_between(source, sink)
        source.senders[0].send(msgspec.structs.replace(send_order(sink, attempt, [1], 16), destination=nowhere))
        source.senders[0].drop(attempt)
        source.senders[0].close_peer(nowhere.epoch)
        assert poll_for([*source.senders], 0.3) == []
