"""Crowds in the simulated cluster: more prompts than blocks, groups that come and go, and everybody leaving at once."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest

from decode_worker.role import DecodeRole
from decode_worker.running import Growth
from prefill_worker.mover import SendingMover
from prefill_worker.role import PrefillRole
from protocol import identity
from protocol.messages import RoleName
from protocol.orders import AnyOrder, SendBlocks, SendMore
from protocol.request import Request, SamplingParams
from protocol.stages import Stage
from router.control.course import MAX_CRASHES
from router.control.events import Outcome
from router.launch import GroupSpec
from tests.simulation.cluster import NOBODY, Client, SimulatedCluster
from tests.simulation.group import GroupSize
from tests.simulation.kv import KVFaults
from tests.simulation.oracle import VOCAB_SIZE
from tests.simulation.scenario import admission_in
from tests.simulation.world import World

LONG_S = 600.0
SMALLEST_POOL = GroupSize(num_blocks=6, max_running=4)  # one request of the largest size and nothing else
LARGE_POOL = GroupSize(num_blocks=80, batch_tokens=24, max_running=64)
OVERCOMMITTED = GroupSize(num_blocks=12, batch_tokens=64, max_running=64, growth=Growth(1, 1000))
NUM_LEAVING = 300
NUM_ROUNDS = 4

SHAPES: dict[str, list[tuple[RoleName, int, int]]] = {
    "1P1D": [("prefill", 1, 1), ("decode", 1, 1)],
    "4P1D": [("prefill", 4, 1), ("decode", 1, 1)],
    "1P4D": [("prefill", 1, 1), ("decode", 4, 1)],
    "3P3D": [("prefill", 3, 1), ("decode", 3, 1)],
    "TP2-TP2": [("prefill", 1, 2), ("decode", 1, 2)],
    "colocated": [("colocated", 2, 1)],
}


@pytest.fixture
def cluster_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., SimulatedCluster]]:
    """Return a function that builds a ready cluster."""
    draws = random.Random(7)

    def build(
        seed: int, shape: str, size: GroupSize, faults: KVFaults | None = None, restart_s: float = 0.5
    ) -> SimulatedCluster:
        world = World(random.Random(seed), faults or KVFaults())
        specs = [GroupSpec(role, group, tp) for role, num, tp in SHAPES[shape] for group in range(num)]
        policy = world.rng.choice(["least_loaded", "round_robin"])
        cluster = SimulatedCluster(world, specs, size, policy, restart_s)
        assert world.clock.run_until(lambda: cluster.is_ready, 5)
        return cluster

    with mock.patch.object(identity.secrets, "randbits", draws.getrandbits):
        yield build


def some_request(rng: random.Random, name: str, num_tokens: int = 18) -> Request:
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, num_tokens)))
    return Request(name, prompt, SamplingParams(rng.randint(2, 6), seed=0, temperature=0.0))


def crowd(cluster: SimulatedCluster, num_requests: int, prefix: str = "crowd", num_tokens: int = 18) -> list[Client]:
    rng = cluster.world.rng
    return [cluster.submit(some_request(rng, f"{prefix}-{index}", num_tokens), LONG_S) for index in range(num_requests)]


def assert_serves(cluster: SimulatedCluster) -> None:
    """Nothing is left of what was before, and the next request is served at once."""
    clock = cluster.world.clock
    assert clock.run_until(lambda: cluster.is_at_rest, 10), [group.num_jobs for group in cluster.groups]
    (client,) = crowd(cluster, 1, f"next-{clock.now_s}")
    clock.run_until(lambda: client.outcome is not None, 1)
    assert client.is_complete, client.outcome


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_many_prompts_and_pools_for_one_request_each_cannot_deadlock(shape: str, seed: int, cluster_of) -> None:
    cluster = cluster_of(seed, shape, SMALLEST_POOL, KVFaults(late=0.2))
    clients = crowd(cluster, 50)
    assert cluster.world.clock.run_until(lambda: cluster.has_ended, LONG_S / 2), "deadlock"
    assert all(client.is_complete for client in clients)
    assert_serves(cluster)


@pytest.mark.parametrize("order", ["newest first", "in any order"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outbox_share", [0.0, 0.5, 1.0])
def test_no_order_of_grants_can_deadlock(outbox_share: float, shape: str, order: str, cluster_of, monkeypatch) -> None:
    """sglang #31473: prefill full of prompts that decode has no room for, decode of room for prompts that wait."""
    monkeypatch.setattr(DecodeRole, "_admit", admission_in(order))
    cluster = cluster_of(5, shape, replace(SMALLEST_POOL, outbox_share=outbox_share), KVFaults(late=0.2))
    clients = crowd(cluster, 40)
    assert cluster.world.clock.run_until(lambda: cluster.has_ended, LONG_S / 2), "deadlock"
    assert all(client.is_complete for client in clients)
    assert_serves(cluster)


def overcommitted_crowd(cluster: SimulatedCluster, num_requests: int, prefix: str = "crowd") -> list[Client]:
    """Short prompts and long answers, so that what runs needs much more than it began with."""
    rng = cluster.world.rng
    prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 6))) for _ in range(num_requests)]
    sampling = SamplingParams(max_tokens=30, seed=0, temperature=0.0)
    return [cluster.submit(Request(f"{prefix}-{i}", prompt, sampling), LONG_S) for i, prompt in enumerate(prompts)]


def num_counted(cluster: SimulatedCluster, counter: str) -> int:
    return sum(role.counters.get(counter, 0) for group in cluster.groups for role in group.roles)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pool_that_was_promised_many_times_over_serves_everybody(shape: str, cluster_of) -> None:
    cluster = cluster_of(6, shape, OVERCOMMITTED)
    clients = overcommitted_crowd(cluster, 40)
    assert cluster.world.clock.run_until(lambda: cluster.has_ended, LONG_S / 2), "deadlock"
    assert all(client.is_complete for client in clients)
    assert_serves(cluster)
    assert num_counted(cluster, "sequences_parked") == num_counted(cluster, "sequences_unparked") > 20


@pytest.mark.parametrize("shape", ["1P1D", "TP2-TP2", "colocated"])
def test_a_group_that_dies_takes_what_it_has_parked_with_it(shape: str, cluster_of) -> None:
    cluster = cluster_of(8, shape, OVERCOMMITTED, restart_s=0.05)
    clients = overcommitted_crowd(cluster, 20)
    for life in range(3):
        assert cluster.world.clock.run_until(lambda: bool(_parked(cluster)), 5)
        decode = next(group for group in cluster.groups if any(rank.parked_kv for rank in group.ranks.values()))
        decode.ranks[max(decode.ranks)].die("killed")
        cluster.world.clock.run_until(lambda: False, 0.2)
        assert cluster.world.clock.run_until(lambda: cluster.is_ready, 5)
        clients += overcommitted_crowd(cluster, 20, f"life-{life}")
    assert cluster.world.clock.run_until(lambda: cluster.has_ended, LONG_S / 2), "deadlock"
    assert num_quarantined(clients) <= 3 - MAX_CRASHES
    assert_serves(cluster)


def num_quarantined(clients: list[Client], *may_end: Outcome) -> int:
    """Who kills one group over and over is taken for one of its requests: at most for one that was tried alone, each
    time beyond those that a request is given. All others are served.
    """
    others = [client.outcome for client in clients if not client.is_complete and client.outcome not in may_end]
    assert all(outcome.code == "quarantined" for outcome in others)
    return len(others)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_that_come_and_go_under_a_crowd_leave_nobody_waiting(shape: str, seed: int, cluster_of) -> None:
    """Requests keep coming while ranks die, so that groups of different ages serve requests of one order."""
    cluster = cluster_of(seed, shape, SMALLEST_POOL, KVFaults(late=0.2), restart_s=0.05)
    world, clients = cluster.world, []
    for index in range(12):
        clients += crowd(cluster, 4, f"wave-{index}")
        world.clock.run_until(lambda: False, 0.15)
        if index % 3 == 1:
            ranks = [rank for group in cluster.groups for rank in group.ranks.values()]
            world.rng.choice(ranks).die("killed")
    assert world.clock.run_until(lambda: cluster.has_ended, LONG_S / 2), "deadlock"
    assert num_quarantined(clients, NOBODY) <= 4 - MAX_CRASHES
    assert_serves(cluster)


# --- everybody leaves -------------------------------------------------------------------------------------------------


def _queued(cluster: SimulatedCluster) -> list[str]:
    return [
        job.prefill.request.request_id
        for role in _roles(cluster, PrefillRole)
        for job in role._jobs.values()
        if not job.sequence
    ]


def _prefilling(cluster: SimulatedCluster) -> list[str]:
    return [job.sequence.request.request_id for role in _roles(cluster, PrefillRole) for job in role._computing]


def _between_chunks(cluster: SimulatedCluster) -> list[str]:
    computing = [job.sequence for role in _roles(cluster, PrefillRole) for job in role._computing]
    return [s.request.request_id for s in computing if s.hold.num_cached * 4 < s.num_computed < s.num_prompt_tokens]


def _computed_without_a_grant(cluster: SimulatedCluster) -> list[str]:
    jobs = [job for role in _roles(cluster, PrefillRole) for job in role._jobs.values()]
    return [job.prefill.request.request_id for job in jobs if job.computed_at is not None and job.grant is None]


def _transferring(cluster: SimulatedCluster) -> list[str]:
    reservations = [r for role in _roles(cluster, DecodeRole) for r in role._reservations.values()]
    return [r.reserve.request.request_id for r in reservations if r.handoff and not r.sequence]


def _committed(cluster: SimulatedCluster) -> list[str]:
    """As the router sees it: decode has committed, and has not said a token yet."""
    courses = cluster.controller.attempts._courses
    found = [courses.get(sequence.request.request_id) for sequence in _running(cluster)]
    lives = [course.life for course in found if course and course.life]
    return [life.request.request_id for life in lives if life.stage is Stage.DECODING and life.num_drawn == 1]


def _decoding(cluster: SimulatedCluster) -> list[str]:
    return [s.request.request_id for s in _running(cluster) if len(s.token_ids) > s.num_prompt_tokens + 1]


def _parked(cluster: SimulatedCluster) -> list[str]:
    return [r.attempt.request_id for role in _roles(cluster, DecodeRole) for r in role._running._parked]


def _running(cluster: SimulatedCluster):
    return [r.sequence for role in _roles(cluster, DecodeRole) for r in role._running]


def _roles(cluster: SimulatedCluster, kind: type) -> list:
    return [role for group in cluster.groups for role in group.roles if isinstance(role, kind)]


PHASES = [_queued, _prefilling, _between_chunks, _computed_without_a_grant, _transferring, _committed, _decoding]


def leave_in(phase: Callable[[SimulatedCluster], list[str]], cluster: SimulatedCluster, clients: list[Client]) -> int:
    """Let every client leave as soon as its request is in this phase; return how many did."""
    ids = {client.request.request_id: client for client in clients}
    num_left = 0

    def look() -> bool:
        nonlocal num_left
        for request_id in phase(cluster):
            client = ids.get(request_id)
            if client and client.outcome is None:
                cluster.cancel(client)
                num_left += 1
        return cluster.has_ended

    assert cluster.world.clock.run_until(look, LONG_S / 2), "a request never ended"
    return num_left


@pytest.mark.parametrize("phase", PHASES, ids=[phase.__name__.strip("_") for phase in PHASES])
def test_three_hundred_clients_leave_in_one_phase_and_nothing_stays_behind(phase, cluster_of) -> None:
    cluster = cluster_of(11, "TP2-TP2", LARGE_POOL, KVFaults(latency_s=0.03))
    for round_number in range(NUM_ROUNDS):
        clients = crowd(cluster, NUM_LEAVING, f"round-{round_number}", num_tokens=40)
        assert leave_in(phase, cluster, clients) > 30
        assert_serves(cluster)


@pytest.mark.parametrize("shape", ["1P1D", "TP2-TP2", "colocated"])
def test_clients_leave_while_their_requests_are_parked_and_nothing_stays_behind(shape: str, cluster_of) -> None:
    cluster = cluster_of(9, shape, OVERCOMMITTED, KVFaults(latency_s=0.03))
    for round_number in range(NUM_ROUNDS):
        clients = overcommitted_crowd(cluster, 60, f"round-{round_number}")
        assert leave_in(_parked, cluster, clients) > 10
        assert_serves(cluster)


def test_parts_of_a_long_prompt_leave_before_its_first_token_is_known(cluster_of, monkeypatch) -> None:
    cluster = cluster_of(3, "1P1D", GroupSize(num_blocks=80, batch_tokens=4))
    parts: list[tuple[int, bool]] = []
    execute = SendingMover.execute

    def noting(mover: SendingMover, order: AnyOrder) -> None:
        if isinstance(order, SendBlocks | SendMore):
            parts.append((order.num_computed, bool(client.token_ids)))
        execute(mover, order)

    monkeypatch.setattr(SendingMover, "execute", noting)
    client = cluster.submit(Request("long", tuple(range(64)) + tuple(range(36)), SamplingParams(3, 0, 0.0)), LONG_S)
    assert cluster.world.clock.run_until(lambda: client.is_complete, 5)
    assert [num_computed for num_computed, _ in parts][-3:] == [92, 96, 100]
    assert not any(is_known for _, is_known in parts)


def is_everywhere(cluster: SimulatedCluster) -> bool:
    return all(phase(cluster) for phase in (_queued, _prefilling, _computed_without_a_grant, _transferring, _decoding))


def test_three_hundred_clients_leave_at_the_same_moment(cluster_of) -> None:
    cluster = cluster_of(12, "4P1D", LARGE_POOL, KVFaults(latency_s=0.03))
    for round_number in range(NUM_ROUNDS):
        clients = crowd(cluster, NUM_LEAVING, f"round-{round_number}")
        assert cluster.world.clock.run_until(lambda: is_everywhere(cluster), 5)
        for client in clients:
            if client.outcome is None:
                cluster.cancel(client)
        assert_serves(cluster)
