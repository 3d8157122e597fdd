"""What any rank of a group drops is counted in its leader's heartbeat, from where it reaches /metrics."""

import socket
from pathlib import Path

import zmq
from prometheus_client import CollectorRegistry

from kernels.process_group import open_store
from protocol.orders import Counted, StopRank, encode
from protocol.request import SamplingParams
from router.front.metrics import ClusterMetrics
from tests.members import member
from tests.models import make_model
from tests.unit.test_metrics_page import PAGE
from tests.worker_cluster import WorkerCluster


def test_strangers_that_a_follower_turns_away_show_in_the_leaders_heartbeat(tmp_path: Path) -> None:
    greedy = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    with WorkerCluster(make_model("llama", tmp_path), [("prefill", 1, 1), ("decode", 1, 2)]) as cluster:
        (prefill, decode) = sorted(cluster.groups(), key=lambda group: group.spec.role == "decode")
        assert decode.ready
        assert decode.leader
        host, _, port = decode.ready.endpoint.addresses[1].removeprefix("tcp://").rpartition(":")
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=5) as stranger:
                stranger.sendall(bytes(60))
        cluster.wait_until(lambda: decode.leader.load.counters.get("stranger") == 3, timeout_s=10)
        cluster.generate([[1, 2, 3]], greedy)
        assert decode.leader.load.counters["stranger"] == 3
        assert prefill.leader
        cluster.assert_pools_whole()
        assert prefill.leader.load.counters["resent_frames"] == 0
        assert prefill.leader.load.counters["connections_zmq"] == 2
        assert prefill.leader.load.counters.keys() | decode.leader.load.counters.keys() <= PAGE


NO_REPORTS = (
    [b"no report"],
    [b""],
    [b"one part", b"and another"],
    [encode(StopRank())],
    [encode(Counted(1, {"frames": 1})).replace(b"frames", b"fr\xffmes")],  # no UTF-8
    [b"\x81\xa7unknown" + b"\x91" * 100_000 + b"\xc0"],  # nested without end
)


def test_reports_to_a_leader_that_do_not_parse_show_in_metrics_and_stop_nobody(tmp_path: Path) -> None:
    greedy = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    with WorkerCluster(make_model("llama", tmp_path), [("prefill", 1, 1), ("decode", 1, 2)]) as cluster:
        registry = CollectorRegistry()
        registry.register(ClusterMetrics(cluster.controller, "test"))

        def num_unparsed(role: str) -> float | None:
            labels = {"role": role, "group": "0", "counter": "unparsed_reports"}
            return registry.get_sample_value("tandem_worker_total", labels)

        (answer,) = cluster.generate([[1, 2, 3]], greedy)
        assert num_unparsed("decode") == 0
        (leader,) = (group.leader for group in cluster.groups() if group.spec.role == "decode")
        assert leader
        host, _, port = str(leader.rendezvous).rpartition(":")
        address = open_store(host, int(port), is_server=False, timeout_s=10).get("orders").decode()
        with zmq.Context() as context, member(context, zmq.DEALER, "orders") as stranger:
            stranger.connect(address)
            for parts in NO_REPORTS:
                stranger.send_multipart(parts)
            cluster.wait_until(lambda: num_unparsed("decode") == len(NO_REPORTS), timeout_s=10)
        assert num_unparsed("prefill") == 0
        assert cluster.generate([[1, 2, 3]], greedy) == [answer]
