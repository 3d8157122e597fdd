"""Processes whose main thread stands still while their sockets live on: they end, and their groups with them."""

import signal
from pathlib import Path

from protocol.request import SamplingParams
from tests.integration.lifelike_cluster import LifelikeCluster
from tests.models import make_model
from worker.dead_man_switch import LEAST_S
from worker.departure import WITHIN_S

PATIENCE_S = 3.0  # of a busy machine
LONG = SamplingParams(max_tokens=900, seed=0, temperature=0.0)


def test_a_rank_that_hangs_ends_its_group_within_seconds_and_a_departing_one_its_own(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, num_hidden_layers=1)
    with LifelikeCluster(model, [("prefill", 1, 1), ("decode", 1, 2)]) as cluster:
        stream = cluster.submit([1, 2, 3], LONG)
        cluster.wait_until(lambda: cluster.leader("decode", 0).load.running == 1)
        cluster.send("decode-0-rank1", signal.SIGUSR1)
        assert cluster.has_ended("decode-0-rank0", LEAST_S + PATIENCE_S)
        assert cluster.has_ended("decode-0-rank1", PATIENCE_S)

        cluster.send("prefill-0-rank0", signal.SIGTERM)
        assert cluster.has_ended("prefill-0-rank0", WITHIN_S + PATIENCE_S)
        cluster.begin_next_lives()
        assert len(stream.result(30).token_ids) == LONG.max_tokens
