import random
import pytest, torch
from tests.models import make_model
from tests.pretend_cuda.device import pretended
from tests.pretend_cuda.operations import use_plain_twins
from tests.worker_cluster import WorkerCluster
from protocol.request import SamplingParams
from cluster.loops import LeaderLoop

ROLES={"colocated":[("colocated",1,1)],"1P1D":[("prefill",1,1),("decode",1,1)]}
@pytest.fixture(scope="module")
def model(tmp_path_factory): return make_model("llama", tmp_path_factory.mktemp("m"), max_position_embeddings=128)

@pytest.mark.parametrize("topology,transport", [("colocated","zmq"),("1P1D","zmq"),("1P1D","shm")])
def test_tokens(model, topology, transport, monkeypatch):
    rng=random.Random(3)
    prompts=[[rng.randrange(500) for _ in range(rng.randint(1,60))] for _ in range(6)]
    ps=[SamplingParams(max_tokens=8, seed=0, temperature=0.0), SamplingParams(max_tokens=8,seed=1,top_k=5,num_logprobs=2,temperature=1.0,repetition_penalty=1.2)]
    with pretended(monkeypatch, 1) as cuda:
        use_plain_twins(monkeypatch, cuda)
        w=LeaderLoop._work
        def work(self):
            with cuda.timeline.no_waiting(): return w(self)
        monkeypatch.setattr(LeaderLoop,"_work",work)
        with WorkerCluster(model, ROLES[topology], transport, memory_bytes=4<<20, device="cuda") as c:
            for p in ps: c.generate(prompts, p)
