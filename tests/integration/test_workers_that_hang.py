"""Processes whose main thread stands still while their sockets live on: they end, and their groups with them."""

import os
import signal
import time
from pathlib import Path

from protocol.request import SamplingParams
from tests.integration.process_cluster import ProcessCluster
from tests.models import make_model
from worker.dead_man_switch import LEAST_S
from worker.departure import WITHIN_S

PATIENCE_S = 3.0  # of a busy machine
SHORT, LONG = (SamplingParams(max_tokens=num, seed=0, temperature=0.0) for num in (5, 900))


def test_a_rank_that_hangs_ends_its_group_within_seconds_and_a_departing_one_its_own(
    tmp_path: Path,
) -> None:
    model = make_model("llama", tmp_path, num_hidden_layers=1)
    with ProcessCluster(model, [("prefill", 1, 1), ("decode", 1, 2)]) as cluster:
        stream = cluster.submit([1, 2, 3], LONG)
        cluster.wait_until(lambda: cluster.leader("decode", 0).load.running == 1)
        os.kill(cluster.pid("decode", 0, rank=1), signal.SIGUSR1)
        hung_s = time.monotonic()
        outcome = stream.result(LEAST_S + PATIENCE_S).outcome
        assert outcome is not None
        assert outcome.code == "worker_lost"
        assert time.monotonic() - hung_s < LEAST_S + PATIENCE_S
        assert cluster.ends_within("decode", 0, 0, PATIENCE_S)
        assert cluster.ends_within("decode", 0, 1, PATIENCE_S)

        os.kill(cluster.pid("prefill", 0), signal.SIGTERM)
        assert cluster.ends_within("prefill", 0, 0, WITHIN_S + PATIENCE_S)
        cluster.wait_until(lambda: not any(rank.is_alive for rank in cluster.leaders()))
        cluster.start_again(("prefill", 0), ("decode", 0))
        assert cluster.submit([1, 2, 3], SHORT).result(30).outcome
