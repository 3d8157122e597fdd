"""Workers come and go for a while under many requests, some of which are given up: `python -m tests.integration.churn`.

Every request ends by its deadline with the right tokens or a named reason, and nothing is left: no block, no process,
no descriptor, no shared memory. A short run is a test (test_churn.py); by default it takes five minutes.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from protocol.identity import new_request_id
from protocol.messages import RoleName
from protocol.request import SamplingParams
from tests.integration.process_cluster import ProcessCluster
from tests.models import make_model
from tests.worker_cluster import Answer, Leave

GROUPS: list[tuple[RoleName, int, int]] = [("prefill", 2, 1), ("decode", 3, 1)]
ENDED_WELL = {"length", "stop"}
NAMED = {"client_gone", "quarantined", "worker_lost"}
CANCELLED = 0.1


@dataclass
class Churn:
    """What happened. wrong: answers that ended well with other tokens than the undisturbed ones."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_lost: int = 0
    num_cut: int = 0
    wrong: list[str] = field(default_factory=list)


def run(cluster: ProcessCluster, seconds: float, num_requests: int, seed: int = 1) -> Churn:
    """Spread the requests over these seconds, lose a group every two to four of them, and see all of it end."""
    generator, churn = random.Random(seed), Churn()
    asked = [_request(generator) for _ in range(40)]
    undisturbed = [cluster.submit(*each).result(60).token_ids for each in asked]
    running: list[tuple[int, Future[Answer]]] = []
    began = time.monotonic()
    next_loss = began + 1
    for number in range(num_requests):
        time.sleep(max(0.0, began + seconds * number / num_requests - time.monotonic()))
        if time.monotonic() > next_loss:
            churn.num_lost += _lose_one(cluster, generator)
            next_loss = time.monotonic() + generator.uniform(2, 4)
        index = generator.randrange(len(asked))
        leave = Leave(after_tokens=generator.randint(1, 40)) if generator.random() < CANCELLED else None
        cluster.wait_until(lambda: cluster.controller.dispatcher.why_none is None)  # or it is refused at the door
        running.append((index, cluster.submit(*asked[index], salt=new_request_id(), leave=leave)))
    for index, future in running:
        _take(churn, future.result(90), undisturbed[index])
    cluster.revive()
    cluster.assert_pools_whole()
    return churn


def _request(generator: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = generator.choices(range(500), k=generator.randint(1, 250))
    kind = generator.choice([{"temperature": 0.0}, {"top_k": 40, "frequency_penalty": 0.5}])
    return prompt, SamplingParams(generator.randint(1, 80), seed=generator.getrandbits(60), **kind)


def _lose_one(cluster: ProcessCluster, generator: random.Random) -> int:
    """Kill or stop one group, if all are there; begin the next life of whoever is gone."""
    cluster.begin_missing()
    if not cluster.are_all_ready():
        return 0
    role, num, _ = generator.choice(GROUPS)
    group, how = generator.randrange(num), generator.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    os.kill(cluster.pid(role, group), how)
    return 1


def _take(churn: Churn, answer: Answer, undisturbed: list[int]) -> None:
    assert answer.outcome is not None
    code = answer.outcome.code
    churn.outcomes[code] += 1
    churn.num_cut += len(answer.cuts)
    is_right = answer.token_ids == undisturbed[: len(answer.token_ids)]
    if not is_right or (code in ENDED_WELL and answer.token_ids != undisturbed) or code not in ENDED_WELL | NAMED:
        churn.wrong.append(f"{code}: {answer.token_ids} instead of {undisturbed}")


def main(seconds: float = 300, num_requests: int = 2000) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessCluster(make_model("llama", Path(folder)), GROUPS, "auto", batch_tokens=64) as cluster,
    ):
        before = _num_open()
        churn = run(cluster, seconds, num_requests)
        print(f"{churn.num_lost} groups lost, streams cut {churn.num_cut} times: {dict(churn.outcomes)}")
        print(f"wrong: {churn.wrong}; descriptors {before} -> {_num_open()}")
    sys.exit(bool(churn.wrong))


def _num_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]))
