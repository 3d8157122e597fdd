"""KV that leaves chunk by chunk while the rest of its prompt is computed: the same tokens, earlier."""

import threading
from pathlib import Path

import msgspec
import pytest
import torch

import kv_transfer.plan
from engine.engine import Engine
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from protocol.orders import Received, SendMore
from protocol.request import SamplingParams
from tests.integration.kv_groups import (
    TRANSPORTS,
    attempt_between,
    connected,
    expect_order,
    poll_for,
    poll_until,
    random_tokens,
    send_order,
)
from tests.integration.test_exact import NUM_TOKENS, TOPOLOGIES, Reference
from tests.worker_cluster import WorkerCluster

torch.set_num_threads(1)
FRAME_BYTES = 16 << 10
SEGMENT_TOKENS = 32


@pytest.fixture
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames so small that even prompts of tiny models leave in many parts."""
    monkeypatch.setattr(kv_transfer.plan, "SEGMENT_TOKENS", SEGMENT_TOKENS)
    for function in (kv_transfer.plan.frames_of, kv_transfer.plan.manifest_of, KVSender.__init__, KVReceiver.__init__):
        monkeypatch.setattr(function, "__defaults__", (FRAME_BYTES,))


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_first_part_of_a_prompt_arrives_before_the_rest_is_computed(name):
    with connected(name, 2, 1, 2, block_sizes=(32, 32)) as (source, sink):
        attempt, kv = attempt_between(source, sink), random_tokens(2, 400)
        ours, theirs = list(range(13)), list(range(13))[::-1]
        sink.receivers[0].expect(expect_order(source, attempt, theirs, 400))
        source.fill(ours, kv[:, :, :, :300])
        for sender in source.senders:
            order = send_order(sink, attempt, ours, 400)
            sender.send(type(order)(*(getattr(order, field) for field in order.__struct_fields__[:-1]), 300))
        assert poll_for([*source.senders, *sink.receivers], 0.5) == []
        arrived = torch.cat([sink.caches[0][:, :, block] for block in theirs], dim=3)
        assert torch.equal(arrived[:, :, :, :256], kv[:, :, :, :256])
        source.fill(ours, kv)
        for sender in source.senders:
            sender.send_more(SendMore(attempt, 400))
        assert poll_until([*source.senders, *sink.receivers], 1) == [Received(0, attempt)]
        sink.note(theirs, 0, kv)
        assert sink.is_as_expected()


@pytest.mark.usefixtures("_small_frames")
@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_layer_arrives_before_the_next_one_is_computed(name):
    with connected(name, 1, 1, 2) as (source, sink):
        attempt, kv = attempt_between(source, sink), random_tokens(2, 64)
        blocks = list(range(4))
        sink.receivers[0].expect(expect_order(source, attempt, blocks, 64))
        sender = source.senders[0]
        sender.send(msgspec.structs.replace(send_order(sink, attempt, blocks, 64), num_computed=0))
        first_layer = kv.clone()
        first_layer[:, 1:] = 0
        source.fill(blocks, first_layer)
        sender.send_more(SendMore(attempt, 64, num_layers=1))
        assert poll_for([sender, *sink.receivers], 0.5) == []
        arrived = torch.cat([sink.caches[0][:, :, block] for block in blocks], dim=3)
        assert torch.equal(arrived[:, 0], kv[:, 0])
        source.fill(blocks, kv)
        sender.send_more(SendMore(attempt, 64))
        assert poll_until([sender, *sink.receivers], 1) == [Received(0, attempt)]
        sink.note(blocks, 0, kv)
        assert sink.is_as_expected()


@pytest.mark.usefixtures("_small_frames")
@pytest.mark.parametrize("topology", ["1P1D", "TP2-TP1"])
def test_layers_leave_while_later_ones_are_computed(tmp_path: Path, topology: str, monkeypatch: pytest.MonkeyPatch):
    """Frames are gathered in the middle of steps, and tokens are what they are without."""
    computing, gathered = threading.local(), []
    compute, room = Engine._compute, KVSender._room

    def note_computing(self, *arguments):
        computing.is_on = True
        try:
            return compute(self, *arguments)
        finally:
            computing.is_on = False

    def note_gathering(self, *arguments):
        gathered.append(getattr(computing, "is_on", False))
        return room(self, *arguments)

    monkeypatch.setattr(Engine, "_compute", note_computing)
    monkeypatch.setattr(KVSender, "_room", note_gathering)
    reference = Reference("llama", tmp_path)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    with WorkerCluster(reference.folder, TOPOLOGIES[topology], memory_bytes=24 << 20, batch_tokens=200) as cluster:
        assert cluster.generate(reference.prompts, greedy) == reference.greedy
        cluster.assert_pools_whole()
    assert gathered.count(True) > 20, "what could leave in the middle of a step waited for its end"


@pytest.mark.usefixtures("_small_frames")
@pytest.mark.parametrize("topology", ["1P1D", "TP2-TP1"])
def test_tokens_equal_transformers_when_prompts_leave_in_many_parts(tmp_path: Path, topology: str):
    reference = Reference("llama", tmp_path)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    with WorkerCluster(
        reference.folder, TOPOLOGIES[topology], memory_bytes=24 << 20, batch_tokens=48, block_sizes=(16, 32)
    ) as cluster:
        assert cluster.generate(reference.prompts, greedy) == reference.greedy
        assert cluster.generate(reference.prompts[::-1], greedy) == reference.greedy[::-1], "from a warm prefix cache"
        cluster.assert_pools_whole()
        (prefill,) = (group.leader for group in cluster.groups() if group.spec.role == "prefill")
        assert prefill
        assert prefill.load.counters["handoffs"] == 2 * len(reference.prompts)
        assert 0 < prefill.load.counters["handoff_exposed_us"] < 60e6 * len(reference.prompts)
