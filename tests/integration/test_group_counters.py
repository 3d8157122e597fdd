"""What any rank of a group drops is counted in its leader's heartbeat, from where it reaches /metrics."""

from pathlib import Path

import zmq

from kv_transfer.frames import FRAME_VERSION
from protocol.request import SamplingParams
from tests.models import make_model
from tests.worker_cluster import WorkerCluster


def test_frames_that_a_follower_drops_show_in_the_leaders_heartbeat(tmp_path: Path) -> None:
    greedy = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    with WorkerCluster(make_model("llama", tmp_path), [("prefill", 1, 1), ("decode", 1, 2)]) as cluster:
        (prefill, decode) = sorted(cluster.groups(), key=lambda group: group.spec.role == "decode")
        assert decode.ready
        assert decode.leader
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.connect(decode.ready.endpoint.addresses[1])
            for _ in range(3):
                peer.send_multipart([b"sequence", bytes([FRAME_VERSION]) + bytes(60), b"payload"])
            cluster.wait_until(lambda: decode.leader.load.counters.get("bad_header") == 3, timeout_s=10)
        cluster.generate([[1, 2, 3]], greedy)
        assert decode.leader.load.counters["bad_header"] == 3
        assert prefill.leader
        cluster.assert_pools_whole()
        assert prefill.leader.load.counters["resent_frames"] == 0
        assert prefill.leader.load.counters["connections_zmq"] == 2
