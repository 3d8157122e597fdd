"""Workers that are killed or stopped in the middle of transfers, in a cluster of two prefill and two decode groups.

Real processes, and a model whose KV takes a moment to move: the signal falls between the handoff, which says that all
frames are on their way, and the commit, which says that they have come. One pair loses its sender and the other pair
its receiver. What must hold: the two that are left serve with one another and take over what was lost, clients see
nothing but a pause, pools are whole soon after the fence, and both pairs work again after a restart.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from protocol.identity import Attempt, Epoch, new_request_id
from protocol.messages import AnyMessage, Committed, Handoff
from protocol.request import SamplingParams
from tests.integration.process_cluster import ProcessCluster
from tests.models import make_model
from tests.worker_cluster import Answer

KV_SIZES = {
    "cpu": {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 512},
    "cuda": {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 256},
}
"""A quarter MiB of KV per token, and 2 MiB where it moves faster."""

MEMORY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}

LONG_PROMPT = random.Random(11).choices(range(500), k=500)
"""Its KV is at least twice what a sender gathers before it waits for answers: at the handoff half of it is in the cache
yet."""

TIMEOUT_S = 2.0
SERVING_WITHIN_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: TIMEOUT_S}
FENCED_WITHIN_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: 4.0}  # silence is believed after a heartbeat's timeout
WHOLE_WITHIN_S = 2.0
GREEDY = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
SHORT_PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Scene:
    """A cluster and what its groups answer while all is well."""

    def __init__(self, cluster: ProcessCluster) -> None:
        self.cluster = cluster
        self.short_answer = self.ask(0, 0, SHORT_PROMPT).result(20).token_ids
        asked_at = time.monotonic()
        self.long_answer = self.ask(1, 1, LONG_PROMPT).result(20).token_ids
        self.long_s = time.monotonic() - asked_at

    def ask(self, prefill: int, decode: int, prompt: list[int]) -> "Future[Answer]":
        """Ask this pair. The salt is another one each time, so that no prefix cache has a part in the answer."""
        self.cluster.route_to(prefill, decode)
        return self.cluster.submit(prompt, GREEDY, salt=new_request_id())

    def serve_short(self, prefill: int, decode: int) -> float:
        """Return how many seconds this pair took for the right answer to the short prompt."""
        asked_at = time.monotonic()
        assert self.ask(prefill, decode, SHORT_PROMPT).result(20).token_ids == self.short_answer
        return time.monotonic() - asked_at

    def are_pools_whole(self) -> bool:
        """Whether all living groups have said that nothing is held."""
        loads = [rank.load for rank in self.cluster.leaders() if rank.is_alive]
        return all(
            load.blocks.held == load.running == load.waiting == 0
            and load.blocks.free + load.blocks.cached == load.blocks.total
            for load in loads
        )


ON_GPU = (pytest.mark.gpu, pytest.mark.timeout(400))  # four processes compile their kernels first
CASES = [
    *(pytest.param((name, "cpu"), id=name) for name in ("zmq", "gloo", "shm")),
    *(pytest.param((name, "cuda"), id=name, marks=ON_GPU) for name in ("nccl", "cuda_ipc")),
]


@pytest.fixture(scope="module", params=CASES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    transport, device = request.param
    with ProcessCluster(
        make_model("llama", tmp_path_factory.mktemp(device), hidden_size=32, **KV_SIZES[device]),
        [("prefill", 2, 1), ("decode", 2, 1)],
        transport,
        memory_bytes=MEMORY_BYTES[device],
        batch_tokens=2048,
        timeout_s=TIMEOUT_S,
        device=device,
        batch_requests=8,
    ) as cluster:
        yield Scene(cluster)


class Traps:
    """Sends a signal to a process when the handoff of a prefill group passes the router, and notes commits of those."""

    def __init__(self, victims: dict[Epoch, int], how: signal.Signals) -> None:
        self.sprung: dict[Attempt, float] = {}
        self.has_committed = False
        self._victims, self._how = victims, how

    def see(self, message: AnyMessage) -> None:
        if isinstance(message, Handoff) and (pid := self._victims.pop(message.attempt.prefill_epoch, None)):
            os.kill(pid, self._how)
            self.sprung[message.attempt] = time.monotonic()
        self.has_committed |= isinstance(message, Committed) and message.attempt in self.sprung


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_workers_lost_in_mid_transfer_cost_their_own_transfers_only(scene: Scene, how: signal.Signals) -> None:
    cluster = scene.cluster
    # This machine may be busy with other things; and the short prompt may come behind those that go on elsewhere.
    quiet_s = max(scene.serve_short(1, 0) for _ in range(2)) + 2 * scene.long_s
    sender, receiver = cluster.pid("prefill", 0), cluster.pid("decode", 1)
    epochs = [cluster.leader("prefill", group).info.epoch for group in (0, 1)]
    traps = Traps({epochs[0]: sender, epochs[1]: receiver}, how)
    cluster.watch(traps.see)
    lost = [scene.ask(0, 0, LONG_PROMPT), scene.ask(1, 1, LONG_PROMPT)]
    cluster.wait_until(lambda: len(traps.sprung) == 2)
    sprung_at = max(traps.sprung.values())
    scene.serve_short(1, 0)
    assert time.monotonic() - sprung_at < SERVING_WITHIN_S[how] + 2 * quiet_s

    assert not traps.has_committed, "the signal came too late: this was not in mid-transfer"
    gone = [cluster.leader("prefill", 0), cluster.leader("decode", 1)]
    cluster.wait_until(lambda: not any(rank.is_alive for rank in gone), timeout_s=10)
    assert time.monotonic() - sprung_at < FENCED_WITHIN_S[how]
    assert [future.result(20).token_ids for future in lost] == [scene.long_answer] * 2, "they went on elsewhere"
    cluster.wait_until(scene.are_pools_whole, WHOLE_WITHIN_S)
    scene.serve_short(1, 0)

    cluster.start_again(("prefill", 0), ("decode", 1))
    answers = [scene.ask(group, group, LONG_PROMPT).result(20).token_ids for group in (0, 1)]
    assert answers == [scene.long_answer] * 2
    cluster.assert_pools_whole()
