"""A decode pool that was promised many times over: who outgrows it is parked in host memory, and no token changes.

Real workers and a real model. The same requests from a pool that holds all of them at once are the truth; the small
pool holds three or four of the sixteen, so that most of them are parked again and again.
"""

import random
from concurrent.futures import Future
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.parked_kv import ParkedKV
from protocol.messages import RoleName
from protocol.request import SamplingParams
from tests.models import make_model
from tests.worker_cluster import Answer, Leave, WorkerCluster

NUM_REQUESTS = 16
NUM_TOKENS = 64
BLOCK_BYTES = 3 * 2 * 2 * 16 * 32 * 4  # layers, keys and values, KV heads, tokens, head_dim, float32
SMALL_POOL = 20 * BLOCK_BYTES
GROUPS: dict[str, list[tuple[RoleName, int, int]]] = {
    "TP1": [("prefill", 1, 1), ("decode", 1, 1)],
    "TP2": [("prefill", 1, 1), ("decode", 1, 2)],
    "colocated": [("colocated", 1, 1)],
}
Requests = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("parking"))


@pytest.fixture(scope="module")
def requests() -> Requests:
    """Greedy and seeded in turn; half of them share a prefix of two blocks."""
    generator = random.Random(4)
    shared = [generator.randrange(500) for _ in range(32)]
    requests = []
    for index in range(NUM_REQUESTS):
        prompt = [generator.randrange(500) for _ in range(generator.randint(1, 60))]
        params = SamplingParams(
            NUM_TOKENS, seed=index, temperature=0.9 * (index % 2), top_k=40, frequency_penalty=0.3 * (index % 2)
        )
        requests.append(((shared if index % 4 < 2 else []) + prompt, params))
    return requests


@pytest.fixture(scope="module")
def answers(model: Path, requests: Requests) -> list[list[int]]:
    with WorkerCluster(model, GROUPS["colocated"], memory_bytes=64 << 20) as cluster:
        return tokens_of([cluster.submit(*request) for request in requests])


@pytest.fixture(params=[False, True], ids=["step by step", "a step ahead"])
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU, where a sequence is parked while its next token is being drawn."""
    monkeypatch.setattr(Engine, "is_asynchronous", request.param)
    monkeypatch.setattr("engine.engine.cuda_capture", lambda: lambda run: run)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[ParkedKV]:
    """What every rank has parked."""
    made: list[ParkedKV] = []
    original = ParkedKV.__init__

    def create(self: ParkedKV, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(ParkedKV, "__init__", create)
    return made


def tokens_of(futures: "list[Future[Answer]]") -> list[list[int]]:
    return [future.result(60).token_ids for future in futures]


def small_cluster(model: Path, topology: str, tensor_parallel: int = 1) -> WorkerCluster:
    memory = SMALL_POOL // tensor_parallel
    is_colocated = topology == "colocated"
    return WorkerCluster(
        model,
        GROUPS[topology],
        memory_bytes=memory if is_colocated else 8 << 20,
        decode_memory_bytes=memory,
        growth_tokens=16,
    )


def num_counted(cluster: WorkerCluster, name: str) -> int:
    return sum(rank.load.counters.get(name, 0) for rank in cluster.leaders())


@pytest.mark.usefixtures("pace")
@pytest.mark.parametrize(("topology", "tensor_parallel"), [("TP1", 1), ("TP2", 2), ("colocated", 1)])
def test_parked_sequences_go_on_as_if_nothing_had_been(
    topology: str, tensor_parallel: int, model: Path, requests: Requests, answers: list[list[int]], copies
) -> None:
    with small_cluster(model, topology, tensor_parallel) as cluster:
        assert tokens_of([cluster.submit(*request) for request in requests]) == answers
        cluster.assert_pools_whole()
        # one whose last token is being drawn may be parked, and ends there
        assert num_counted(cluster, "sequences_parked") >= num_counted(cluster, "sequences_unparked") > 3
        cluster.wait_until(lambda: not any(map(len, copies)), timeout_s=5)


def test_clients_that_leave_take_what_is_parked_for_them_along(
    model: Path, requests: Requests, answers: list[list[int]], copies
) -> None:
    with small_cluster(model, "TP2", 2) as cluster:
        leaves = [Leave(after_tokens=5 * index) if index % 3 else None for index in range(1, NUM_REQUESTS + 1)]
        futures = [cluster.submit(*request, leave=leave) for request, leave in zip(requests, leaves, strict=True)]
        for future, leave, answer in zip(futures, leaves, answers, strict=True):
            found = future.result(60).token_ids
            assert found == (answer[: len(found)] if leave else answer)
        cluster.assert_pools_whole()
        assert num_counted(cluster, "sequences_parked")
        cluster.wait_until(lambda: not any(map(len, copies)), timeout_s=5)
        assert tokens_of([cluster.submit(*requests[0])]) == [answers[0]]
