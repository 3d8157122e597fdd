"""One seed: a topology, requests, faults at random times, and what must hold whatever happens.

Every client gets the oracle's tokens or a clear error that one of the faults explains; afterwards every pool is whole,
nobody holds or counts anything, and the next request is served at once. Deadlines are far away unless a request was
given a short one, so a deadlock shows as an end that nothing explains.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

from msgspec.structs import replace as replace_fields

from decode_worker.role import DecodeRole
from decode_worker.running import ALL_AT_ONCE, Growth
from kv_transfer import sender
from protocol import identity
from protocol.messages import RoleName
from protocol.request import Request, SamplingParams
from router.control import held_prefixes
from router.control.course import MAX_CRASHES
from router.launch import GroupSpec
from tests.simulation.cluster import LONG_S, NOBODY, Client, SimulatedCluster
from tests.simulation.group import GroupSize
from tests.simulation.kv import TIMEOUT_S, KVFaults
from tests.simulation.oracle import POISON, VOCAB_SIZE
from tests.simulation.world import World
from worker.control_link import RECONNECT_MS

BACK_AFTER_S = RECONNECT_MS / 1000
AT_REST_WITHIN_S = 3 * TIMEOUT_S + 2 * BACK_AFTER_S
SERVED_WITHIN_S = 1.5
FAULT_TIME_S = 0.25
"""Requests and faults fall into the first quarter of a second, in which an undisturbed run would be over."""

LOSSES_END_S = 1.5
"""Then no frame and no answer is lost any more: what was sent, and perhaps once more, arrives at the last try."""

Topology = list[tuple[RoleName, int, int]]
TOPOLOGIES: list[Topology] = [
    [("prefill", 1, 1), ("decode", 1, 1)],
    [("prefill", 1, 1), ("decode", 1, 1)],
    [("prefill", 2, 1), ("decode", 2, 1)],
    [("prefill", 3, 1), ("decode", 1, 1)],
    [("prefill", 1, 1), ("decode", 2, 1)],
    [("prefill", 1, 2), ("decode", 1, 1)],
    [("prefill", 1, 1), ("decode", 1, 2)],
    [("prefill", 1, 2), ("decode", 1, 2)],
    [("colocated", 1, 1)],
    [("colocated", 2, 1)],
]


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong. num_poisons: of requests that end whatever group computes them. explained: the codes
    of errors that clients may see for it.

    crowded: the share of seeds with many requests at once and the smallest pools that can serve them.
    """

    name: str
    kv: KVFaults
    num_crashes: int = 0
    num_cuts: int = 0
    num_pauses: int = 0
    num_poisons: int = 0
    cancels: float = 0.0
    short_deadlines: float = 0.0
    crowded: float = 0.2

    @property
    def explained(self) -> set[str]:
        """What goes wrong with workers and frames costs a client time and nothing else, but for one end too many."""
        return {"quarantined"} if self.num_crashes + self.num_cuts > MAX_CRASHES else set()


FAULTS = [
    Faults("none", KVFaults()),
    Faults("slow frames and cancels", KVFaults(latency_s=0.05), cancels=0.5),
    Faults("late frames in a crowd", KVFaults(late=0.2, late_s=0.03), crowded=0.75),
    Faults("doubled and reordered frames", KVFaults(double=0.3, late=0.3), cancels=0.2),
    Faults("lost and damaged frames", KVFaults(drop=0.05, flip=0.05, lose_answer=0.05, late=0.1), cancels=0.2),
    Faults("a crash", KVFaults(late=0.2), num_crashes=1),
    Faults("crashes and cancels", KVFaults(late=0.3, double=0.2), num_crashes=3, cancels=0.3),
    Faults("a cut connection", KVFaults(latency_s=0.05), num_cuts=1),
    Faults("a poison request", KVFaults(late=0.2), num_poisons=1, cancels=0.1),
    Faults("deadlines and pauses", KVFaults(late=0.2), num_pauses=3, short_deadlines=0.4),
    Faults("everything", KVFaults(0.02, 0.1, 0.02, 0.2, 0.02), 2, 1, 1, cancels=0.2, short_deadlines=0.1),
]

GROWTHS = [ALL_AT_ONCE, Growth(1, 3), Growth(1, 100), Growth(2, 100), Growth(3, 8)]

_RANDOM = {"temperature": 1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "top_k": 40}
"""Draws that depend on their number, and on what was drawn before."""

GRANT_ORDERS = ["first come, first served", "first come, first served", "newest first", "in any order"]
"""Production's, and others: whatever it is, nothing may deadlock."""


def faults_of(seed: int) -> Faults:
    """Return what goes wrong under this seed."""
    return random.Random(seed).choice(FAULTS)


class Scenario:
    """Everything that follows from one seed."""

    def __init__(self, seed: int, is_told: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.faults = self.rng.choice(FAULTS)
        self.world = World(self.rng, self.faults.kv, is_told)
        self.world.kv.in_pairs = seed % 4 == 2
        self.world.clock.after(LOSSES_END_S, self._end_losses)
        topology = self.rng.choice(TOPOLOGIES)
        specs = [GroupSpec(role, group, tp) for role, num, tp in topology for group in range(num)]
        self.is_crowded = self.rng.random() < self.faults.crowded
        size = GroupSize(
            num_blocks=6 if self.is_crowded else self.rng.choice([6, 8, 12, 30]),
            batch_tokens=self.rng.choice([3, 6, 16, 32]),
            max_running=self.rng.choice([2, 8]),
            num_kv_heads=self.rng.choice([1, 2]),
            outbox_share=self.rng.choice([0.0, 0.3, 0.5, 1.0]),
            growth=self.rng.choice(GROWTHS[1:] if self.is_crowded else GROWTHS),
            is_ahead=seed % 2 == 1,
            min_fetch_tokens=2 if seed % 3 == 1 else 0,
        )
        self.grant_order = self.rng.choice(GRANT_ORDERS)
        block_size = self.rng.choice([size.block_size, 2, 8])
        num_blocks = size.num_blocks * size.block_size // block_size
        decode_size = replace(size, block_size=block_size, num_blocks=num_blocks)
        self.world.tell(lambda: f"{topology}, {size}, decode blocks of {block_size}, faults: {self.faults.name}")
        self.world.tell(lambda: f"decode grants {self.grant_order}")
        policy = self.rng.choice(["least_loaded", "round_robin"])
        self.cluster = SimulatedCluster(self.world, specs, size, policy, decode_size=decode_size)
        self._num_slots = size.num_blocks * size.block_size
        self._may_end: dict[str, set[str]] = {}
        self._num_turns_due = 0
        if size.min_fetch_tokens:
            self.cluster.on_end = self._plan_next_turn

    def run(self) -> None:
        """Live through it. Raise AssertionError for anything that must not be."""
        clock, cluster = self.world.clock, self.cluster
        assert clock.run_until(lambda: cluster.is_ready, 5), "the groups never became ready"
        self._plan_requests(8 if self.is_crowded else self.rng.choice([2, 3, 4, 5]))
        self._plan_faults()
        clock.run_until(lambda: False, FAULT_TIME_S)
        has_ended = clock.run_until(lambda: cluster.has_ended and not self._num_turns_due, LONG_S + 1)
        assert has_ended, "a request never ended"
        num_lost = sum(group.num_poisoned for group in cluster.groups)
        assert num_lost <= self.faults.num_poisons * (MAX_CRASHES + 1), f"{num_lost} groups were lost to poison"
        for client in cluster.clients.values():
            self._check(client, self._may_end[client.request.request_id])
        assert clock.run_until(lambda: cluster.is_at_rest, AT_REST_WITHIN_S), self._unrest()
        self._check_next_request()

    # --- what happens -------------------------------------------------------------------------------------------------

    def _plan_requests(self, num_requests: int) -> None:
        """Submit requests at random times, and note which ends besides the faults' own would be no surprise."""
        within_s = FAULT_TIME_S / 40 if self.is_crowded else FAULT_TIME_S / 4
        for index in range(num_requests):
            request, timeout_s = self._request(f"request-{index}")
            leaves = self.rng.random() < self.faults.cancels
            self._may_end[request.request_id] = {"client_gone"} if leaves else set()
            if timeout_s < LONG_S:
                self._may_end[request.request_id].add("deadline_exceeded")
            self.world.clock.after(self.rng.random() * within_s, partial(self._submit, request, leaves, timeout_s))
        for index in range(self.faults.num_poisons):
            poison = Request(f"poison-{index}", (1, POISON), SamplingParams(max_tokens=3, seed=0, temperature=0.0))
            self._may_end[poison.request_id] = {"quarantined"}
            self.world.clock.after(self.rng.random() * within_s, partial(self._submit, poison, leaves=False))

    def _plan_next_turn(self, client: Client) -> None:
        """A client that was answered goes on with the conversation, as long as it fits the smallest pool."""
        said = (*client.request.prompt_token_ids, *client.token_ids, self.rng.randrange(VOCAB_SIZE))
        num_left = self._num_slots - len(said)
        if client.is_complete and num_left > 0 and not client.request.request_id.endswith("+++"):
            sampling = SamplingParams(self.rng.randint(1, min(6, num_left)), seed=0, temperature=0.0)
            request = Request(f"{client.request.request_id}+", said, sampling)
            self._may_end[request.request_id] = {"client_gone"}
            self._num_turns_due += 1
            leaves = self.rng.random() < self.faults.cancels / 2
            self.world.clock.after(self.rng.random() * 0.01, partial(self._take_turn, request, leaves))

    def _take_turn(self, request: Request, leaves: bool) -> None:
        self._num_turns_due -= 1
        self._submit(request, leaves)

    def _submit(self, request: Request, leaves: bool, timeout_s: float = LONG_S) -> None:
        client = self.cluster.submit(request, timeout_s)
        if leaves:
            self.world.clock.after(self._moment() / (2 if self.is_crowded else 4), lambda: self.cluster.cancel(client))

    def _request(self, request_id: str) -> tuple[Request, float]:
        """A prompt that often shares a prefix with others, and a deadline; its answer may end by itself."""
        rng = self.rng
        shared, max_tokens = ((0, 4, 4), 10) if self.is_crowded else ((0, 4, 9), 6)
        prompt = [*range(1, 10)][: rng.choice(shared)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))]
        ends = tuple(rng.sample(range(VOCAB_SIZE), 6))
        sampling = SamplingParams(max_tokens=rng.randint(1, max_tokens), seed=0, temperature=0.0, eos_token_ids=ends)
        if self.seed % 4 == 2:
            min_tokens = sampling.max_tokens // 2
            sampling = replace_fields(sampling, **_RANDOM, seed=rng.getrandbits(62), min_tokens=min_tokens)
        is_short = rng.random() < self.faults.short_deadlines
        return Request(request_id, tuple(prompt), sampling), rng.random() * 0.1 if is_short else LONG_S

    def _plan_faults(self) -> None:
        clock = self.world.clock
        for _ in range(self.faults.num_crashes):
            clock.after(self._moment(), self._crash)
        for _ in range(self.faults.num_cuts):
            clock.after(self._moment(), self._cut)
        for _ in range(self.faults.num_pauses):
            clock.after(self._moment(), self._pause)

    def _crash(self) -> None:
        self._any_rank().die("killed")

    def _cut(self) -> None:
        """The network breaks; the router's socket may find out only when heartbeats stay out."""
        rank = self._any_rank()
        self.world.tell(lambda: f"the wire of {rank.name} is cut")
        rank.wire.cut(noticed_after_s=self.rng.choice((0.0, 2.0)), back_after_s=BACK_AFTER_S * (1 + self.rng.random()))

    def _pause(self) -> None:
        self._any_rank().pause(self.rng.random() * 0.5)

    def _end_losses(self) -> None:
        self.world.kv.faults = replace(self.world.kv.faults, drop=0.0, lose_answer=0.0)

    def _any_rank(self):
        return self.rng.choice([rank for group in self.cluster.groups for rank in group.ranks.values()])

    def _moment(self) -> float:
        return self.rng.random() * FAULT_TIME_S

    # --- what must hold -----------------------------------------------------------------------------------------------

    def _check(self, client: Client, may_end: set[str]) -> None:
        assert client.outcome is not None
        if client.outcome == NOBODY:
            faults = self.faults
            assert faults.num_crashes + faults.num_cuts + faults.num_poisons, "nobody was lost, and nobody was there"
        elif not client.is_complete:
            code = client.outcome.code
            assert code in may_end | self.faults.explained, (
                f"{client.request.request_id}: unexplained end {client.outcome}"
            )
        else:
            assert client.token_ids == client.answer

    def _check_next_request(self) -> None:
        for group in self.cluster.groups:
            assert group.pool is not None
            group.pool.check()
        self.world.kv.faults = KVFaults()
        client = self.cluster.submit(Request("next", tuple(range(1, 11)), SamplingParams(3, 0, 0.0)))
        self.world.clock.run_until(lambda: client.outcome is not None, SERVED_WITHIN_S)
        assert client.is_complete, f"the next request was not served at once: {client.outcome}"

    def _unrest(self) -> str:
        held = {
            f"{g.spec.role}-{g.spec.group}": (g.is_serving, g.pool and g.pool.counts, g.num_jobs)
            for g in self.cluster.groups
        }
        controller = self.cluster.controller
        return f"not at rest: {held}, {len(controller.attempts)} attempts, {controller.dispatcher.load}"


def admission_in(order: str) -> Callable[[DecodeRole], None]:
    """Return DecodeRole._admit for another order of grants."""
    rank = {"newest first": lambda r: -r.number, "in any order": lambda r: r.attempt.transfer_id}[order]

    def admit(role: DecodeRole) -> None:
        while role._running.restore() and role._waiting:
            reservation = min(role._waiting, key=rank)
            if not role._start(reservation):
                return
            role._waiting.remove(reservation)
            role._grant_when_ready(reservation)

    return admit


def run_seed(seed: int, is_told: bool = False) -> None:
    """Run one seed; the identities that production draws from the system's randomness come from the seed as well."""
    draws = random.Random(~seed)
    window_bytes = draws.choice((64, 128, sender.WINDOW_BYTES))  # a small one leaves pieces in the cache for later
    with (
        mock.patch.object(identity.secrets, "randbits", draws.getrandbits),
        mock.patch.object(sender, "WINDOW_BYTES", window_bytes),
        mock.patch.object(held_prefixes, "PIECE_TOKENS", 2),
    ):
        scenario = Scenario(seed, is_told)
        admit = DecodeRole._admit
        if scenario.grant_order != GRANT_ORDERS[0]:
            admit = admission_in(scenario.grant_order)
        with mock.patch.object(DecodeRole, "_admit", admit):
            scenario.run()


if __name__ == "__main__":
    run_seed(int(sys.argv[1]), is_told=True)
