"""See churn.py: a short run of it."""

from pathlib import Path

import pytest

from tests.integration.churn import GROUPS, run
from tests.integration.process_cluster import ProcessCluster
from tests.models import make_model


@pytest.mark.slow
def test_workers_that_come_and_go_cost_no_request_its_answer(tmp_path: Path) -> None:
    with ProcessCluster(make_model("llama", tmp_path), GROUPS, "auto", batch_tokens=64) as cluster:
        churn = run(cluster, seconds=12, num_requests=120)
    assert churn.wrong == []
    assert churn.num_lost >= 2
    assert sum(churn.outcomes.values()) == 120
