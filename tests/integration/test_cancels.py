"""Three hundred clients leave at once, in every phase of their requests: real workers, real sockets, a real model.

Where a request is when its client leaves follows from how long its prompt is and what the client has waited for. What
was there before must be there again: every block of every pool, and the next answer at once, token for token.
"""

import random
import time
from pathlib import Path

import pytest

from protocol.messages import RoleName
from protocol.request import SamplingParams
from tests.models import make_model
from tests.worker_cluster import Leave, WorkerCluster

NUM_CLIENTS = 300
NUM_ROUNDS = 4
SERVED_WITHIN_S = 5.0
GREEDY = SamplingParams(max_tokens=8, seed=0, temperature=0.0)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]

TOPOLOGIES: dict[str, list[tuple[RoleName, int, int]]] = {
    "2P2D": [("prefill", 2, 1), ("decode", 2, 1)],
    "colocated": [("colocated", 1, 1)],
}
LEAVES = {
    "queued": Leave(after_s=0.0),
    "prefilling, or between chunks": Leave(after_s=0.1),
    "computed, or transferring": Leave(after_tokens=1),
    "just committed": Leave(after_tokens=2),
    "decoding": Leave(after_tokens=5),
    "anywhere": Leave(after_s=0.5),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("cancels"))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_three_hundred_clients_leave_and_the_next_one_is_served_at_once(model: Path, topology: str) -> None:
    generator = random.Random(3)
    with WorkerCluster(model, TOPOLOGIES[topology], memory_bytes=6 << 20, batch_tokens=128) as cluster:
        (answer,) = cluster.generate([PROMPT], GREEDY)
        for _ in range(NUM_ROUNDS):
            futures = []
            for index in range(NUM_CLIENTS):
                prompt = [generator.randrange(500) for _ in range(generator.choice((1, 20, 200)))]
                futures.append(cluster.submit(prompt, GREEDY, leave=[*LEAVES.values()][index % len(LEAVES)]))
            outcomes = [future.result(60).outcome for future in futures]
            codes = {outcome.code for outcome in outcomes if outcome}
            assert codes <= {"client_gone", "length"}
            assert sum(outcome.code == "client_gone" for outcome in outcomes if outcome) > NUM_CLIENTS // 2
            started_s = time.monotonic()
            assert cluster.generate([PROMPT], GREEDY) == [answer]
            assert time.monotonic() - started_s < SERVED_WITHIN_S
            cluster.assert_pools_whole()
