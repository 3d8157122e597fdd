"""A fetch that prefill has given up, while decode's blocks go on to somebody else: nothing foreign reaches an answer.

docs/decisions/0010-fetching-from-decode.md allows decode to go on reading for such a fetch. Here one rank of decode
cannot send, so that prefill computes, and the other one finds no room for its frames until the request was parked and
another one has written over its blocks. Real workers over real sockets; that the late frames hold foreign KV is looked
at, and so is that they arrive.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.rank import Rank
from kv_transfer.transports.transport import Destination, OutgoingFrame, Site
from protocol.identity import Epoch
from protocol.orders import Batch
from protocol.request import SamplingParams
from protocol.topology import Transport
from router.control.dispatch import Dispatcher
from tests.integration.test_fetching import Conversation, Wire, counted, fetching_cluster
from tests.integration.test_parking import BLOCK_BYTES
from tests.worker_cluster import WorkerCluster

torch.set_num_threads(1)
BLOCK_SIZE = 16
NUM_BLOCKS = 17  # the longest prompt here and its answer
ELDER_PROMPT = [index * 11 % 500 for index in range(20)]
ELDER = SamplingParams(max_tokens=NUM_BLOCKS * BLOCK_SIZE - len(ELDER_PROMPT), seed=0, temperature=0.0)
"""With its answer the elder fills every block, so that whoever came after it must make way."""
LONG = SamplingParams(max_tokens=80, seed=0, temperature=0.0)


class LateWire(Wire):
    """Sends what it is given; when told to, one rank's fetches find no room and every other's arrive damaged.

    Room is found when that rank has parked somebody and another sequence has got to the last block of the pool.
    """

    full_towards: Epoch | None = None
    full: "dict[str, LateWire]"
    wires: "list[LateWire]"
    rank_of_thread: dict[int, tuple[Rank, int]]  # and the longest context of its last batch

    def __init__(self, name: Transport, site: Site) -> None:
        super().__init__(name, site)
        self.staging = self._staging
        self.sent: dict[tuple[int, int], torch.Tensor] = {}  # payloads of fetches, by source rank and index
        self.is_late = False
        self.wires.append(self)

    def _staging(self, destination: Destination, num_bytes: int) -> torch.Tensor | None:
        if destination.epoch == self.full_towards and self.full.setdefault("wire", self) is self and not self.is_late:
            if not self._are_blocks_overwritten():
                return None
            self.is_late = True
            self.sent.clear()
        return self.real.staging(destination, num_bytes)

    def _are_blocks_overwritten(self) -> bool:
        rank, longest = self.rank_of_thread[threading.get_ident()]
        return len(rank._parked_kv) == 1 and longest > (NUM_BLOCKS - 1) * BLOCK_SIZE

    def send(self, frame: OutgoingFrame) -> None:
        frame = frame.sealed()
        if frame.destination.epoch == frame.header.attempt.prefill_epoch:
            self.sent[frame.header.source_rank, frame.header.piece.index] = frame.payload.clone()
            if self.full_towards and self.full.get("wire") is not self:
                frame.payload[0] ^= 1
        self.real.send(frame)


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory) -> Conversation:
    return Conversation(tmp_path_factory.mktemp("given_up"))


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LateWire]]:
    """The class of every sending wire, which knows how far the rank on its thread has got.

    Prefill waits for every grant, so that what decode holds is never computed before it could be fetched.
    """

    class OwnWire(LateWire):
        full, wires, rank_of_thread = {}, [], {}

    original = Rank.forward

    def forward(self: Rank, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor | None:
        OwnWire.rank_of_thread[threading.get_ident()] = self, max(batch.context_lens)
        return original(self, batch, drawn)

    monkeypatch.setattr(Rank, "forward", forward)
    monkeypatch.setattr(Dispatcher, "has_room", lambda self, decode, request: True)
    monkeypatch.setattr("worker.assembly.open_sender", OwnWire)
    return OwnWire


def true_answers(folder: Path, prompt: list[int]) -> list[list[int]]:
    """Return what a cluster says in which nothing is fetched and nobody is parked."""
    with WorkerCluster(folder, [("colocated", 1, 1)]) as cluster:
        (of_elder,), (of_prompt,) = cluster.generate([ELDER_PROMPT], ELDER), cluster.generate([prompt], LONG)
    return [of_elder, of_prompt]


def test_what_a_fetch_reads_after_it_was_given_up_reaches_no_answer(
    conversation: Conversation, wire: type[LateWire]
) -> None:
    prompt = conversation.prompts[1]
    truth = true_answers(conversation.folder, prompt)
    memory = NUM_BLOCKS * BLOCK_BYTES // 2
    with fetching_cluster(conversation, "TP1-TP2", decode_memory_bytes=memory, growth_tokens=BLOCK_SIZE) as cluster:
        conversation.hold(cluster, 2, salt="undisturbed")
        undisturbed = {key: payload for each in wire.wires for key, payload in each.sent.items()}
        conversation.hold(cluster, 1)
        (prefill,) = (group.ready for group in cluster.groups() if group.spec.role == "prefill")
        assert prefill
        wire.full_towards = prefill.epoch
        futures = [cluster.submit(ELDER_PROMPT, ELDER), cluster.submit(prompt, LONG)]
        assert [future.result(60).token_ids for future in futures] == truth

        late = wire.full["wire"]
        assert late.is_late
        assert late.sent.keys() < undisturbed.keys()
        assert not any(is_close(payload, undisturbed[key]) for key, payload in late.sent.items()), "it is foreign KV"
        cluster.wait_until(lambda: counted(cluster, "unknown_attempt") >= len(late.sent) > 0, timeout_s=5)
        assert (counted(cluster, "fetches"), counted(cluster, "failed_fetches")) == (1, 1)
        assert counted(cluster, "sequences_unparked") == 1

        wire.full_towards = None
        assert cluster.generate([prompt], LONG) == [truth[1]], "what prefill and decode kept of it is right"
        conversation.hold(cluster)


def is_close(payload: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(payload.view(torch.float32), other.view(torch.float32), atol=1e-3)
