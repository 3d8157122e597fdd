"""Whole workers on a device that is late wherever CUDA may be late: the tokens of a CPU, and loops that never wait.

Real roles, movers, transports and control plane, as threads of one process; see tests/pretend_cuda for the device.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from protocol.messages import RoleName
from protocol.request import SamplingParams
from protocol.topology import Transport
from tests.models import make_model
from tests.pretend_cuda.device import PretendCuda, pretended
from tests.pretend_cuda.links import join_gpus, join_ranks
from tests.pretend_cuda.operations import IS_INTERPRETED, note_compilations, use_kernels
from tests.worker_cluster import Leave, WorkerCluster
from worker.loops import FollowerLoop, LeaderLoop

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the place of torch.cuda is taken")

NUM_TOKENS = 12
BLOCK_BYTES = 2 * 2 * 2 * 16 * 32 * 4  # layers, keys and values, KV heads, tokens, head_dim, float32
GROUPS: dict[str, list[tuple[RoleName, int, int]]] = {
    "colocated": [("colocated", 1, 1)],
    "1P1D": [("prefill", 1, 1), ("decode", 1, 1)],
    "TP2-TP2": [("prefill", 1, 2), ("decode", 1, 2)],
}
CASES = [("colocated", "zmq"), *(("1P1D", transport) for transport in ("zmq", "shm", "nccl", "cuda_ipc"))]
CASES += [("TP2-TP2", "auto")]
Requests = list[tuple[list[int], SamplingParams]]
Answers = list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2, max_position_embeddings=256)


@pytest.fixture(scope="module")
def requests() -> Requests:
    """Half of them share two blocks; some are longer than a step."""
    rng = random.Random(4)
    shared = [rng.randrange(500) for _ in range(32)]
    lengths = (1, 16, 17, 40, 60, 90, 5, 33)
    return [
        (
            (shared if index % 2 else []) + [rng.randrange(500) for _ in range(length)],
            SamplingParams(
                NUM_TOKENS, seed=index, temperature=0.9 * (index % 3), top_k=40, presence_penalty=0.3 * (index % 2)
            ),
        )
        for index, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def answers(model: Path, requests: Requests) -> Answers:
    with WorkerCluster(model, GROUPS["colocated"]) as cluster:
        return generate(cluster, requests)


@pytest.fixture(params=[0, 1])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with pretended(monkeypatch, request.param) as device:
        use_kernels(monkeypatch, device)
        join_gpus(monkeypatch)
        join_ranks(monkeypatch)
        yield device


def generate(cluster: WorkerCluster, requests: Requests) -> Answers:
    return [future.result(60).token_ids for future in [cluster.submit(*request) for request in requests]]


def never_wait(monkeypatch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    """Let a worker's loop fail when it waits for the device."""
    for loop in (LeaderLoop, FollowerLoop):
        monkeypatch.setattr(loop, "turn", without_waiting(loop.turn, cuda))


def without_waiting(turn: Callable[[Any], Any], cuda: PretendCuda) -> Callable[[Any], Any]:
    def hurry(loop: Any) -> Any:
        with cuda.timeline.no_waiting():
            return turn(loop)

    return hurry


@pytest.mark.parametrize(("topology", "transport"), CASES)
def test_workers_on_a_gpu_give_the_tokens_of_a_cpu_and_their_loops_never_wait(
    cuda: PretendCuda,
    topology: str,
    transport: Transport,
    model: Path,
    requests: Requests,
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never_wait(monkeypatch, cuda)
    groups = GROUPS[topology]
    with WorkerCluster(
        model, groups, transport, memory_bytes=1 << 20, batch_tokens=64, batch_requests=6, device="cuda"
    ) as cluster:
        assert generate(cluster, requests) == answers
        assert generate(cluster, requests[::-1]) == answers[::-1], "from a warm prefix cache"
        cluster.assert_pools_whole()


def test_who_leaves_and_who_is_parked_on_a_gpu_changes_nothing_for_the_others(
    cuda: PretendCuda, model: Path, requests: Requests, answers: Answers
) -> None:
    """The decode pool holds three of the eight; blocks change hands while steps that write to them are under way."""
    with WorkerCluster(
        model,
        GROUPS["1P1D"],
        memory_bytes=1 << 20,
        decode_memory_bytes=20 * BLOCK_BYTES,
        growth_tokens=4,
        batch_tokens=64,
        batch_requests=6,
        device="cuda",
    ) as cluster:
        leaves = [Leave(after_tokens=index) if index % 3 == 2 else None for index in range(len(requests))]
        futures = [cluster.submit(*request, leave=leave) for request, leave in zip(requests, leaves, strict=True)]
        for future, leave, answer in zip(futures, leaves, answers, strict=True):
            found = future.result(60).token_ids
            assert found == (answer[: len(found)] if leave else answer)
        assert generate(cluster, requests) == answers
        cluster.assert_pools_whole()
        assert sum(rank.load.counters.get("sequences_unparked", 0) for rank in cluster.leaders())


def test_earlier_turns_that_are_fetched_from_decode_are_what_was_computed_there(
    cuda: PretendCuda, model: Path, requests: Requests, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_wait(monkeypatch, cuda)
    groups = GROUPS["1P1D"]
    greedy = SamplingParams(60, seed=0, temperature=0.0)
    with WorkerCluster(model, groups) as cluster:
        first = cluster.generate([requests[0][0] * 30], greedy)[0]
        second = cluster.generate([requests[0][0] * 30 + first + [5]], greedy)[0]
    with WorkerCluster(
        model, groups, memory_bytes=1 << 20, batch_tokens=64, batch_requests=6, min_fetch_tokens=16, device="cuda"
    ) as cluster:
        assert cluster.generate([requests[0][0] * 30], greedy)[0] == first
        assert cluster.generate([requests[0][0] * 30 + first + [5]], greedy)[0] == second
        cluster.assert_pools_whole()
        assert sum(rank.load.counters.get("fetched_tokens", 0) for rank in cluster.leaders())


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled there")
@pytest.mark.usefixtures("fresh_chip")
@pytest.mark.parametrize("cuda", [1], indirect=True)
@pytest.mark.parametrize(("topology", "transport"), [("colocated", "zmq"), ("1P1D", "shm"), ("1P1D", "cuda_ipc")])
def test_once_workers_are_ready_nobody_waits_for_a_compilation(
    cuda: PretendCuda,
    topology: str,
    transport: Transport,
    model: Path,
    requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = note_compilations(monkeypatch)
    with WorkerCluster(
        model,
        GROUPS[topology],
        transport,
        memory_bytes=(20 if topology == "colocated" else 200) * BLOCK_BYTES,
        decode_memory_bytes=20 * BLOCK_BYTES,
        growth_tokens=4,
        batch_tokens=64,
        batch_requests=6,
        device="cuda",
    ) as cluster:
        when_ready = set(noted)
        generate(cluster, [(prompt, replace(sampling, max_tokens=60)) for prompt, sampling in requests])
        cluster.assert_pools_whole()
        assert sum(rank.load.counters.get("sequences_unparked", 0) for rank in cluster.leaders())
    assert noted - when_ready == set()
