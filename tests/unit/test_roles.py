"""The roles in a simulated cluster: right answers, no leak, no deadlock, whatever the order of events."""

import random

import pytest

from decode_worker.inbox import RemoteInbox
from protocol.orders import SendBlocks
from protocol.request import Request, SamplingParams
from tests.simulated_cluster import VOCAB_SIZE, Client, SimulatedCluster, Worker, oracle_answer

TOPOLOGIES = {
    "1P1D": (["prefill"], ["decode"]),
    "2P2D": (["prefill", "prefill"], ["decode", "decode"]),
    "3P1D": (["prefill"] * 3, ["decode"]),
    "colocated": (["colocated"] * 2, []),
}


def build(seed: int, topology: str, num_blocks: int) -> tuple[SimulatedCluster, list[tuple[int, int]]]:
    """Return a cluster and the pairs of groups that can serve a request."""
    cluster = SimulatedCluster(seed, num_blocks)
    first, second = TOPOLOGIES[topology]
    firsts = [cluster.add(index + 1, kind) for index, kind in enumerate(first)]
    seconds = [cluster.add(index + 100, kind) for index, kind in enumerate(second)]
    return cluster, [(p, d) for p in firsts for d in seconds] or [(c, c) for c in firsts]


def random_request(generator: random.Random, index: int) -> Request:
    """A prompt that often shares a prefix with others, and an answer of 1 to 12 tokens."""
    shared = [1, 2, 3, 4, 5, 6, 7, 8, 9][: generator.randrange(10)]
    own = [generator.randrange(VOCAB_SIZE) for _ in range(generator.randrange(1, 30))]
    sampling = SamplingParams(max_tokens=generator.randrange(1, 13), seed=0, temperature=0.0)
    return Request(f"request-{index}", (*shared, *own), sampling, timeout_s=60.0)


def run_to_the_end(cluster: SimulatedCluster, clients: list[Client], abort_share: float) -> None:
    generator = cluster.random
    leavers = [client for client in clients if generator.random() < abort_share]
    while cluster.happen():
        if leavers and generator.random() < 0.05:
            leaver = leavers.pop()
            if not leaver.is_over:
                cluster.abort(leaver)
    for leaver in leavers:
        assert leaver.is_over or leaver.tokens == oracle_answer(leaver.request)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("seed", range(40))
def test_every_answer_is_right_and_every_pool_is_whole(topology: str, seed: int) -> None:
    generator = random.Random(seed)
    cluster, pairs = build(seed, topology, num_blocks=generator.choice([14, 20, 60]))
    clients = [cluster.start(random_request(generator, index), *generator.choice(pairs)) for index in range(20)]
    run_to_the_end(cluster, clients, abort_share=generator.choice([0.0, 0.3]))
    for client in clients:
        assert client.is_over, f"{client.request.request_id} never ended: deadlock"
        answer = oracle_answer(client.request)
        assert client.failure is None
        assert client.tokens == answer[: len(client.tokens)], "an answer was computed from somebody else's KV"
    for worker in cluster.workers.values():
        worker.pool.check()
        assert worker.pool.counts.held == 0, "a block leaked"
        assert sum(role.num_running + role.num_waiting for role in worker.roles) == 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_without_cancels_every_answer_is_complete(topology: str) -> None:
    cluster, pairs = build(7, topology, num_blocks=20)
    generator = random.Random(7)
    clients = [cluster.start(random_request(generator, index), *generator.choice(pairs)) for index in range(30)]
    run_to_the_end(cluster, clients, abort_share=0.0)
    assert [client.tokens for client in clients] == [oracle_answer(client.request) for client in clients]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_request_that_can_never_fit_fails_and_the_next_is_served(topology: str) -> None:
    cluster, pairs = build(1, topology, num_blocks=8)
    too_large = Request("large", tuple(range(30)), SamplingParams(max_tokens=10, seed=0, temperature=0.0), 60.0)
    small = Request("small", (1, 2, 3), SamplingParams(max_tokens=4, seed=0, temperature=0.0), 60.0)
    large_client, small_client = cluster.start(too_large, *pairs[0]), cluster.start(small, *pairs[0])
    run_to_the_end(cluster, [large_client, small_client], abort_share=0.0)
    assert large_client.failure is not None
    assert large_client.failure.code == "kv_cache_too_small"
    assert small_client.tokens == oracle_answer(small)


def _answers_are_wrong(seed: int) -> bool:
    """Run one crowded 2P2D simulation with many cancels; return whether an answer came from foreign KV."""
    generator = random.Random(seed)
    cluster, pairs = build(seed, "2P2D", num_blocks=14)
    clients = [cluster.start(random_request(generator, index), *generator.choice(pairs)) for index in range(20)]
    try:
        run_to_the_end(cluster, clients, abort_share=0.5)
    except KeyError:
        return True  # the oracle met a slot that nobody ever wrote
    return any(client.tokens != oracle_answer(client.request)[: len(client.tokens)] for client in clients)


def test_the_simulation_finds_a_decode_side_that_forgets_to_drop_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteInbox, "drop", lambda self, attempt: None)
    assert any(_answers_are_wrong(seed) for seed in range(40))


def test_the_simulation_finds_a_decode_side_that_commits_before_its_ranks_have_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RemoteInbox, "num_reporting", 0)
    assert any(_answers_are_wrong(seed) for seed in range(40))


def test_parts_of_a_long_prompt_leave_before_its_first_token_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, pairs = build(3, "1P1D", num_blocks=60)
    request = Request("long", tuple(range(100)), SamplingParams(max_tokens=3, seed=0, temperature=0.0), 60.0)
    parts: list[tuple[int, bool]] = []
    send_part = Worker.send_part

    def noting(worker: Worker, order: SendBlocks, first: int, num_computed: int) -> None:
        parts.append((num_computed, bool(client.tokens)))
        send_part(worker, order, first, num_computed)

    monkeypatch.setattr(Worker, "send_part", noting)
    client = cluster.start(request, *pairs[0])
    run_to_the_end(cluster, [client], abort_share=0.0)
    assert client.tokens == oracle_answer(request)
    assert [num_computed for num_computed, _ in parts][-3:] == [72, 96, 100]
    assert not any(is_known for _, is_known in parts)
