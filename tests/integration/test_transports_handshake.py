"""Ranks whose layouts differ although the control plane thinks otherwise: refused when they meet, and said at once."""

import time

import msgspec
import pytest
import torch

from kv_transfer import handshake
from protocol.layout import Endpoint
from protocol.orders import Broken, Received
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
    send_order,
    transfer,
)

torch.set_num_threads(1)
transports = pytest.mark.parametrize("name", TRANSPORTS)

OTHERS = {"model_hash": "another", "num_layers": 4, "num_kv_heads": 4, "head_dim": 16, "dtype": "float16"}


def send_and_expect_refusal(source: Source, sink: Sink) -> str:
    """Send as if the sink had the source's layout, as its leader was told; return why the transfer broke."""
    attempt = attempt_between(source, sink)
    claimed = Endpoint(sink.epoch, source.layout, "any", sink.endpoint.addresses)
    before = sink.caches[0].clone()
    began = time.monotonic()
    order = msgspec.structs.replace(send_order(sink, attempt, [1, 2], 32), destination=claimed)
    source.senders[0].send(order)
    (report,) = poll_until([*source.senders], 1)
    assert time.monotonic() - began < 2, "said at once, not after a timeout"
    assert isinstance(report, Broken)
    assert report.attempt == attempt
    assert poll_for([*source.senders, *sink.receivers], 0.05) == []
    assert torch.equal(sink.caches[0], before)
    assert sink.counters().keys() == {"refused_peer"}, "once for every connection"
    return report.reason


@transports
@pytest.mark.parametrize("field", OTHERS)
def test_a_rank_of_another_layout_is_refused_with_both_values(name, field):
    theirs = msgspec.structs.replace(layout(1, 2), **{field: OTHERS[field]})
    with connected(name) as (source, _):
        sink = Sink(name, layout(1, 2))
        other = Sink(name, theirs) if field != "dtype" else Sink(name, theirs, torch.float16)
        try:
            reason = send_and_expect_refusal(source, other)
            assert f"{field} differs" in reason
            assert str(OTHERS[field]) in reason
            assert str(getattr(source.layout, field)) in reason
            assert type(transfer(source, sink, 40)[0]) is Received, "others are not disturbed"
        finally:
            other.close()
            sink.close()


@transports
def test_a_rank_of_another_version_is_refused_with_both_versions(name, monkeypatch):
    with connected(name) as (source, sink):
        real = handshake.greeting(source.layout)
        for module in ("zmq.sender", "slab.sender", "torch.sender"):
            monkeypatch.setattr(f"kv_transfer.transports.{module}.greeting", lambda shape: b"\x01" + real[1:])
        with connected(name) as (old, _):
            assert f"sender 1, receiver {real[0]}" in send_and_expect_refusal(old, sink)
        monkeypatch.undo()
        with connected(name) as (new, _):
            attempt = attempt_between(new, sink)
            sink.receivers[0].expect(expect_order(new, attempt, [3, 4], 32))
            new.senders[0].send(send_order(sink, attempt, [5, 6], 32))
            assert poll_until([*new.senders, *sink.receivers], 1) == [Received(0, attempt)]
