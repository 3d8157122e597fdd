"""Conversations whose earlier turns prefill fetches from decode: the very tokens that transformers gives, turn by turn.

Real workers over real sockets. What was fetched is counted, so that a test cannot pass by computing everything.
"""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kv_transfer.transports.opening import open_sender
from kv_transfer.transports.transport import OutgoingFrame, Site
from protocol.messages import AnyMessage, Fetch, Handoff, RoleName, Unfetched
from protocol.request import SamplingParams
from protocol.topology import Transport
from tests.integration.process_cluster import ProcessCluster
from tests.models import make_model, reference_model
from tests.worker_cluster import Leave, WorkerCluster

torch.set_num_threads(1)
NUM_TURNS = 3
NUM_TOKENS = 50
MIN_FETCH_TOKENS = 32
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
ONE_PAIR: list[tuple[RoleName, int, int]] = [("prefill", 1, 1), ("decode", 1, 1)]
CASES: dict[str, tuple[list[tuple[RoleName, int, int]], Transport, tuple[int, int]]] = {
    "1P1D over zmq": (ONE_PAIR, "zmq", (16, 16)),
    "1P1D over gloo": (ONE_PAIR, "gloo", (16, 16)),
    "1P1D over shm": (ONE_PAIR, "shm", (16, 16)),
    "1P1D, blocks of 16 to 32": (ONE_PAIR, "zmq", (16, 32)),
    "1P1D, blocks of 32 to 16": (ONE_PAIR, "zmq", (32, 16)),
    "2P1D": ([("prefill", 2, 1), ("decode", 1, 1)], "zmq", (16, 16)),
    "TP1-TP2": ([("prefill", 1, 1), ("decode", 1, 2)], "zmq", (16, 16)),
    "TP2-TP1": ([("prefill", 1, 2), ("decode", 1, 1)], "zmq", (16, 16)),
}


class Conversation:
    """What is said in turns, and what transformers answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_model("llama", folder)
        generator, model = random.Random(17), reference_model(self.folder)
        self.prompts: list[list[int]] = []
        self.answers: list[list[int]] = []
        said: list[int] = []
        for _ in range(NUM_TURNS):
            said = said + [generator.randrange(500) for _ in range(40)]
            ids = torch.tensor([said])
            with torch.inference_mode():
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
                )
            self.prompts.append(said)
            self.answers.append([int(token) for token in output[0, len(said) :]])
            said = said + self.answers[-1]

    def hold(self, cluster: WorkerCluster, num_turns: int = NUM_TURNS, salt: str = "") -> None:
        """Go through its first turns, each after the last one's answer."""
        for prompt, answer in list(zip(self.prompts, self.answers, strict=True))[:num_turns]:
            assert cluster.submit(prompt, GREEDY, salt).result(30).token_ids == answer


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory) -> Conversation:
    return Conversation(tmp_path_factory.mktemp("fetching"))


def fetching_cluster(
    conversation: Conversation, case: str = "1P1D over zmq", kind: type[WorkerCluster] = WorkerCluster, **options: int
) -> WorkerCluster:
    roles, transport, block_sizes = CASES[case]
    given = {"memory_bytes": 8 << 20, "block_sizes": block_sizes, "min_fetch_tokens": MIN_FETCH_TOKENS, **options}
    return kind(conversation.folder, roles, transport, **given)  # type: ignore[arg-type]


def counted(cluster: WorkerCluster, name: str) -> int:
    return sum(rank.load.counters.get(name, 0) for rank in cluster.leaders())


@pytest.mark.parametrize("case", CASES)
def test_every_turn_fetches_what_decode_grew_and_says_what_transformers_says(
    conversation: Conversation, case: str
) -> None:
    with fetching_cluster(conversation, case) as cluster:
        conversation.hold(cluster)
        cluster.wait_until(lambda: counted(cluster, "fetches") == NUM_TURNS - 1, timeout_s=5)
        grown = sum(map(len, conversation.answers[:-1]))
        assert counted(cluster, "fetched_tokens") >= grown - 32 * (NUM_TURNS - 1)
        assert counted(cluster, "failed_fetches") == 0
        cluster.assert_pools_whole()


def test_nothing_is_fetched_unless_the_topology_says_so(conversation: Conversation) -> None:
    seen: list[AnyMessage] = []
    with fetching_cluster(conversation, min_fetch_tokens=0) as cluster:
        cluster.watch(seen.append)
        conversation.hold(cluster)
        assert any(isinstance(message, Handoff) for message in seen)
        assert not any(isinstance(message, Fetch) for message in seen)


# --- what goes wrong in the middle of a fetch -------------------------------------------------------------------------


class Wire:
    """A real SendingTransport that damages all frames of fetches, or holds them back, when it is told to."""

    is_damaging = False
    is_holding = False
    held: list[OutgoingFrame]

    def __init__(self, name: Transport, site: Site) -> None:
        self.held = []
        self.real = real = open_sender(name, site)
        self.settled, self.staging, self.drop = real.settled, real.staging, real.drop
        self.close_peer, self.close = real.close_peer, real.close

    @property
    def counters(self) -> dict[str, int]:
        return self.real.counters

    def send(self, frame: OutgoingFrame) -> None:
        frame = frame.sealed()
        is_fetch = frame.destination.epoch == frame.header.attempt.prefill_epoch
        if is_fetch and self.is_damaging:
            frame.payload[0] ^= 1
        if is_fetch and self.is_holding:
            self.held.append(frame)
        else:
            self.real.send(frame)


@contextmanager
def cluster_over_wires(conversation: Conversation, case: str) -> Iterator[tuple[WorkerCluster, type[Wire], list[Wire]]]:
    wires: list[Wire] = []

    class OwnWire(Wire):
        def __init__(self, name: Transport, site: Site) -> None:
            super().__init__(name, site)
            wires.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.assembly.open_sender", OwnWire)
        with fetching_cluster(conversation, case) as cluster:
            yield cluster, OwnWire, wires


@pytest.mark.parametrize("case", ["1P1D over shm", "TP2-TP1", "TP1-TP2"])
def test_a_fetch_that_fails_is_computed_instead(conversation: Conversation, case: str) -> None:
    seen: list[AnyMessage] = []
    with cluster_over_wires(conversation, case) as (cluster, wire, _):
        cluster.watch(seen.append)
        conversation.hold(cluster, 1)
        wire.is_damaging = True
        conversation.hold(cluster, 2)
        cluster.wait_until(lambda: counted(cluster, "failed_fetches") == 1, timeout_s=5)
        assert any(isinstance(message, Unfetched) and "bad_digest" in message.reason for message in seen)
        assert counted(cluster, "fetches") == 0
        cluster.assert_pools_whole()
        wire.is_damaging = False
        conversation.hold(cluster)
        cluster.wait_until(lambda: counted(cluster, "fetches") == NUM_TURNS - 2, timeout_s=5)


@pytest.mark.parametrize("case", ["1P1D over zmq", "TP1-TP2"])
def test_frames_of_a_fetch_that_come_after_its_client_has_left_are_not_used(
    conversation: Conversation, case: str
) -> None:
    with cluster_over_wires(conversation, case) as (cluster, wire, wires):
        conversation.hold(cluster, 1)
        wire.is_holding = True
        late = cluster.submit(conversation.prompts[1], GREEDY)
        cluster.wait_until(lambda: any(wire.held for wire in wires))
        cluster.leave_together()
        outcome = late.result(10).outcome
        assert outcome
        assert outcome.code == "client_gone"
        cluster.assert_pools_whole()
        wire.is_holding = False
        other = cluster.submit(conversation.prompts[2], GREEDY, salt="over the same blocks")
        for wire_of_a_rank in wires:
            for frame in wire_of_a_rank.held:
                wire_of_a_rank.real.send(frame)
        assert other.result(30).token_ids == conversation.answers[2]
        cluster.wait_until(lambda: counted(cluster, "unknown_attempt") >= 1, timeout_s=5)
        conversation.hold(cluster)
        cluster.assert_pools_whole()


def test_a_client_that_leaves_while_its_prompt_is_fetched_leaves_nothing_behind(conversation: Conversation) -> None:
    with fetching_cluster(conversation) as cluster:
        conversation.hold(cluster, 1)
        leaver = cluster.submit(conversation.prompts[1], GREEDY, leave=Leave(at_message=Fetch)).result(10)
        assert leaver.outcome
        assert leaver.outcome.code == "client_gone"
        cluster.assert_pools_whole()
        conversation.hold(cluster)
        cluster.wait_until(lambda: counted(cluster, "fetches") == NUM_TURNS - 1, timeout_s=5)


def test_a_decode_worker_that_dies_in_mid_fetch_is_replaced_and_asked_for_nothing_it_does_not_hold(
    conversation: Conversation,
) -> None:
    with fetching_cluster(conversation, kind=ProcessCluster) as cluster:
        assert isinstance(cluster, ProcessCluster)
        pid = cluster.pid("decode", 0)
        conversation.hold(cluster, 1)
        cluster.watch(lambda message: os.kill(pid, signal.SIGKILL) if isinstance(message, Fetch) else None)
        interrupted = cluster.submit(conversation.prompts[1], GREEDY)
        cluster.wait_until(lambda: not cluster.leader("decode", 0).is_alive)
        cluster.watch(lambda message: None)
        cluster.start_again(("decode", 0))
        assert interrupted.result(10).token_ids == conversation.answers[1], "it went on when decode was back"
        conversation.hold(cluster)
        cluster.assert_pools_whole()
