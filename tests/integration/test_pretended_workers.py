"""Whole workers on a device that is late wherever CUDA may be late: the tokens of a CPU, and loops that never wait.

Real roles, movers, transports and control plane, as threads of one process; see tests/pretend_cuda for the device.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.loops import LeaderLoop
from protocol.messages import RoleName
from protocol.request import SamplingParams
from protocol.topology import Transport
from tests.models import make_model
from tests.pretend_cuda.device import PretendCuda, pretended
from tests.pretend_cuda.links import join_gpus
from tests.pretend_cuda.operations import use_plain_twins
from tests.worker_cluster import WorkerCluster

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the place of torch.cuda is taken")

NUM_TOKENS = 12
GROUPS: dict[str, list[tuple[RoleName, int, int]]] = {
    "colocated": [("colocated", 1, 1)],
    "1P1D": [("prefill", 1, 1), ("decode", 1, 1)],
}
CASES = [("colocated", "zmq"), *(("1P1D", transport) for transport in ("zmq", "shm", "nccl", "cuda_ipc"))]
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
        use_plain_twins(monkeypatch, device)
        join_gpus(monkeypatch)
        yield device


def generate(cluster: WorkerCluster, requests: Requests) -> Answers:
    return [future.result(60).token_ids for future in [cluster.submit(*request) for request in requests]]


def never_wait(monkeypatch: pytest.MonkeyPatch, cuda: PretendCuda) -> None:
    """Let a leader's loop fail when it waits for the device."""
    work = LeaderLoop._work

    def work_without_waiting(loop: LeaderLoop) -> bool:
        with cuda.timeline.no_waiting():
            return work(loop)

    monkeypatch.setattr(LeaderLoop, "_work", work_without_waiting)


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
