"""Two prefill and two decode workers under Ray lose one of each in mid-stream: the others serve, and both come back."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster_process import ClusterProcess, Worker
from tests.e2e.processes import wait_for

NUM_STREAMS = 6
LONG = 600
NOTICED_S = 2.0
AT_ONCE_S = 3.0
WHOLE_S = 2.0
BACK_S = 90.0


def ask(cluster: ClusterProcess, num_tokens: int, **options: Any) -> Any:
    return cluster.client().completions.create(
        model=cluster.model,
        prompt="Once upon a time",
        max_tokens=num_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
        **options,
    )


def are_whole(workers: list[Worker]) -> bool:
    pools = [worker["blocks"] for worker in workers]
    return all(pool["held"] == 0 and pool["free"] + pool["cached"] == pool["total"] > 0 for pool in pools)


@pytest.mark.slow
def test_a_pair_that_is_lost_leaves_the_other_serving_with_whole_pools_and_both_come_back(model: Path):
    cluster = ClusterProcess("cpu_2p2d.yaml", model, "kv_transfer.transport=auto")
    try:
        lost = [cluster.worker("prefill", 1), cluster.worker("decode", 0)]
        left = [("prefill", 0), ("decode", 1)]
        streams = [ask(cluster, LONG, stream=True) for _ in range(NUM_STREAMS)]
        for stream in streams:
            next(iter(stream))
        for worker in lost:
            os.kill(worker["pid"], signal.SIGKILL)
        living = {worker["epoch"] for worker in cluster.workers()} - {worker["epoch"] for worker in lost}
        assert len(living) == 2
        wait_for(lambda: not is_any_ready(cluster, lost), NOTICED_S, "both are noticed")
        asked_at = time.monotonic()
        assert ask(cluster, 8).choices[0].finish_reason == "length"
        assert time.monotonic() - asked_at < AT_ONCE_S
        for stream in streams:
            stream.close()
        wait_for(lambda: are_whole([cluster.worker(*name) for name in left]), WHOLE_S, "the others hold nothing")
        for worker in lost:
            cluster.wait_until_back(worker, BACK_S)
        for _ in range(4):  # every pair
            assert ask(cluster, 8).choices[0].finish_reason == "length"
        cluster.tear_down()
    finally:
        cluster.destroy()


def is_any_ready(cluster: ClusterProcess, lives: list[Worker]) -> bool:
    epochs = {life["epoch"] for life in lives}
    return any(worker["epoch"] in epochs and worker["state"] == "ready" for worker in cluster.workers())
