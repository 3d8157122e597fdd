"""Workers that are killed or stopped in the middle of a transfer, in a cluster of two prefill and two decode groups.

Real processes, and a model whose KV takes a moment to move: the signal falls between the handoff, which says that all
frames are on their way, and the commit, which says that they have come. What must hold: the other pairs go on serving,
the client hears what happened, every pool is whole soon after the fence, and the pair works again after a restart.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from protocol.identity import Attempt, new_request_id
from protocol.messages import AnyMessage, Committed, Handoff, RoleName
from protocol.request import SamplingParams
from tests.integration.process_cluster import ProcessCluster, Route
from tests.models import make_model
from tests.worker_cluster import Answer

KV_SIZES = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 512}
"""A quarter MiB of KV per token."""

LONG_PROMPT = random.Random(11).choices(range(500), k=500)
"""Its KV is twice what a sender gathers before it waits for answers: at the handoff half of it is in the cache yet."""

TIMEOUT_S = 2.0
SERVING_WITHIN_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: TIMEOUT_S}
FENCED_WITHIN_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: 4.0}  # silence is believed after a heartbeat's timeout
WHOLE_WITHIN_S = 2.0
GREEDY = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
SHORT_PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("faults"), hidden_size=32, **KV_SIZES)


class Scene:
    """A cluster and what its groups answer while all is well."""

    def __init__(self, cluster: ProcessCluster, route: Route) -> None:
        self.cluster = cluster
        self.route = route
        self.short_answer = self.ask(0, 0, SHORT_PROMPT).result(20).token_ids
        self.long_answer = self.ask(1, 1, LONG_PROMPT).result(20).token_ids

    def ask(self, prefill: int, decode: int, prompt: list[int]) -> "Future[Answer]":
        """Ask this pair. The salt is another one each time, so that no prefix cache has a part in the answer."""
        self.route.prefill, self.route.decode = prefill, decode
        return self.cluster.submit(prompt, GREEDY, salt=new_request_id())

    def ask_the_others(self, lost: RoleName) -> list["Future[Answer]"]:
        """Ask every pair that does without group 0 of this role, first the one with which it had to do."""
        return [self.ask(*(pair if lost == "decode" else pair[::-1]), SHORT_PROMPT) for pair in ((0, 1), (1, 1))]

    def are_pools_whole(self) -> bool:
        """Whether all living groups have said that nothing is held."""
        loads = [rank.load for rank in self.cluster.leaders() if rank.is_alive]
        return all(
            load.blocks.held == load.running == load.waiting == 0
            and load.blocks.free + load.blocks.cached == load.blocks.total
            for load in loads
        )


@pytest.fixture(scope="module", params=["zmq", "gloo", "shm"])
def scene(request: pytest.FixtureRequest, model: Path) -> Iterator[Scene]:
    route = Route()
    with ProcessCluster(
        model,
        [("prefill", 2, 1), ("decode", 2, 1)],
        request.param,
        memory_bytes=256 << 20,
        batch_tokens=2048,
        policy=route,
        timeout_s=TIMEOUT_S,
    ) as cluster:
        yield Scene(cluster, route)


class Trap:
    """Sends a signal to a process when a handoff passes the router, and notes whether that transfer was committed."""

    def __init__(self, pid: int, how: signal.Signals) -> None:
        self.sprung_at: float | None = None
        self.has_committed = False
        self._pid, self._how = pid, how
        self._attempt: Attempt | None = None

    def see(self, message: AnyMessage) -> None:
        if isinstance(message, Handoff) and self.sprung_at is None:
            os.kill(self._pid, self._how)
            self.sprung_at, self._attempt = time.monotonic(), message.attempt
        self.has_committed |= isinstance(message, Committed) and message.attempt == self._attempt


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_lost_in_mid_transfer_costs_its_own_transfer_only(
    scene: Scene, role: RoleName, how: signal.Signals
) -> None:
    cluster = scene.cluster
    trap = Trap(cluster.pid(role, 0), how)
    cluster.watch(trap.see)
    lost = scene.ask(0, 0, LONG_PROMPT)
    cluster.wait_until(lambda: trap.sprung_at is not None)
    assert trap.sprung_at
    for answer in scene.ask_the_others(role):
        assert answer.result(20).token_ids == scene.short_answer
    assert time.monotonic() - trap.sprung_at < SERVING_WITHIN_S[how]

    outcome = lost.result(20).outcome
    assert outcome
    assert outcome.code in ("worker_lost", "transfer_failed")
    assert not trap.has_committed, "the signal came too late: this was not in mid-transfer"
    cluster.wait_until(lambda: not cluster.leader(role, 0).is_alive, timeout_s=10)
    fenced_at = time.monotonic()
    assert fenced_at - trap.sprung_at < FENCED_WITHIN_S[how]
    cluster.wait_until(scene.are_pools_whole, WHOLE_WITHIN_S)
    for answer in scene.ask_the_others(role):
        assert answer.result(20).token_ids == scene.short_answer

    cluster.start_again(role, 0)
    assert scene.ask(0, 0, LONG_PROMPT).result(20).token_ids == scene.long_answer
    cluster.assert_pools_whole()
