"""Ranks whose layouts differ although the control plane thinks otherwise: refused when they meet, and said at once."""

import time

import msgspec
import pytest
import torch

from kv_transfer.frames import FRAME_VERSION
from kv_transfer.handshake import Caller
from protocol.layout import Endpoint, Plane, keys_and_values
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

OTHERS = {
    "another model": ({"model_hash": "another"}, "model_hash differs: model and another"),
    "more layers": ({"num_layers": 4}, "num_layers differs: 3 and 4"),
    "more heads": ({"planes": keys_and_values(4, 8, "float32")}, "2 x 8 float32 + 2 x 8 float32 and 4 x 8 float32 + 4"),
    "wider heads": ({"planes": keys_and_values(2, 16, "float32")}, "2 x 8 float32 and 2 x 16 float32 + 2 x 16 float32"),
    "another type": ({"planes": keys_and_values(2, 8, "float16")}, "2 x 8 float32 and 2 x 8 float16 + 2 x 8 float16"),
    "one plane": (
        {"planes": (Plane(2, 8, "float32"),)},
        "KV geometry differs: 2 x 8 float32 + 2 x 8 float32 and 2 x 8",
    ),
}
"""What else a layout may be, and what is said of it."""


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


@pytest.mark.parametrize(("name", "other"), [*zip(TRANSPORTS * 3, OTHERS, strict=False)])
def test_a_rank_of_another_layout_is_refused_with_both_values(name, other):
    change, complaint = OTHERS[other]
    theirs = msgspec.structs.replace(layout(1, 2), **change)
    with connected(name) as (source, _):
        sink = Sink(name, layout(1, 2))
        other = Sink(name, theirs)
        try:
            assert complaint in send_and_expect_refusal(source, other)
            assert type(transfer(source, sink, 40)[0]) is Received, "others are not disturbed"
        finally:
            other.close()
            sink.close()


@transports
def test_a_rank_of_another_version_is_refused_with_both_versions(name, monkeypatch):
    with connected(name) as (_, sink):
        hello = Caller.hello

        def hello_of_version_1(caller: Caller, challenge: bytes) -> bytes:
            return hello(caller, challenge).replace(bytes([FRAME_VERSION]), b"\x01", 1)

        monkeypatch.setattr(Caller, "hello", hello_of_version_1)
        with connected(name) as (old, _):
            assert f"sender 1, receiver {FRAME_VERSION}" in send_and_expect_refusal(old, sink)
        monkeypatch.undo()
        with connected(name) as (new, _):
            attempt = attempt_between(new, sink)
            sink.receivers[0].expect(expect_order(new, attempt, [3, 4], 32))
            new.senders[0].send(send_order(sink, attempt, [5, 6], 32))
            assert poll_until([*new.senders, *sink.receivers], 1) == [Received(0, attempt)]
