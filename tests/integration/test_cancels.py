"""Three hundred clients leave at once, in every phase of their requests: real workers, real sockets, a real model.

In which phase each of them left is not guessed from the time but seen inside the workers, and every phase must have
been met. What was there before must be there again: every block of every pool, and the next answer at once, token for
token.
"""

import random
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from decode_worker.role import DecodeRole
from engine.sequence import Chunk
from prefill_worker.role import PrefillRole
from protocol.identity import Attempt
from protocol.messages import Abort, AnyMessage, Committed, Grant, Handoff, RoleName
from protocol.request import SamplingParams
from router.control.attempts import Attempts
from tests.models import make_model
from tests.worker_cluster import Answer, Leave, WorkerCluster

NUM_CLIENTS = 300
NUM_ROUNDS = 4
SERVED_WITHIN_S = 5.0
GREEDY = SamplingParams(max_tokens=8, seed=0, temperature=0.0)
ENDLESS = SamplingParams(max_tokens=700, seed=0, temperature=0.0)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]

TOPOLOGIES: dict[str, list[tuple[RoleName, int, int]]] = {
    "2P2D": [("prefill", 2, 1), ("decode", 2, 1)],
    "colocated": [("colocated", 1, 1)],
}
LEAVES = [
    Leave(after_s=0.0),
    Leave(after_s=0.1),
    Leave(at_message=Grant),
    Leave(after_tokens=1),
    Leave(at_message=Handoff),
    Leave(at_message=Committed),
    Leave(after_tokens=2),
    Leave(after_tokens=5),
    Leave(after_s=0.5),
]
PHASES = {"queued", "prefilling", "between chunks", "transferring", "between commit and first decode", "decoding"}


class Witness:
    """Stands beside the roles, and says in which phase a request was when its client left.

    "prefilling" is seen on the router's thread, while the forward pass runs; everything else when the abort comes.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.phases: Counter[str] = Counter()
        self._in_pass: set[str] = set()
        for role, phase in ((PrefillRole, self._phase_of_job), (DecodeRole, self._phase_of_reservation)):
            patch.setattr(role, "receive", self._seen(role.receive, phase))
        schedule, commit, cancel = PrefillRole.schedule, PrefillRole.commit, Attempts.cancel

        def scheduled(role: PrefillRole, num_tokens: int) -> list[Chunk]:
            chunks = schedule(role, num_tokens)
            self._in_pass |= {chunk.sequence.request.request_id for chunk in chunks}
            return chunks

        def committed(role: PrefillRole, chunk: Chunk, drawn: Any) -> None:
            self._in_pass.discard(chunk.sequence.request.request_id)
            commit(role, chunk, drawn)

        def cancelled(attempts: Attempts, request_id: str, outcome: Any) -> Any:
            self.phases["prefilling"] += request_id in self._in_pass
            return cancel(attempts, request_id, outcome)

        patch.setattr(PrefillRole, "schedule", scheduled)
        patch.setattr(PrefillRole, "commit", committed)
        patch.setattr(Attempts, "cancel", cancelled)

    @property
    def met(self) -> set[str]:
        return {phase for phase, number in self.phases.items() if number}

    def _seen(self, receive: Any, phase: Any) -> Any:
        def received(role: Any, message: AnyMessage) -> None:
            if isinstance(message, Abort) and (name := phase(role, message.attempt)):
                self.phases[name] += 1
            receive(role, message)

        return received

    @staticmethod
    def _phase_of_job(role: PrefillRole, attempt: Attempt) -> str | None:
        job = role._jobs.get(attempt)
        if job is None:
            return None
        if job.sequence is None:
            return "queued"
        if job.computed_at is None:
            return "between chunks" if job.sequence.num_computed else "admitted"
        return "transferring" if job.is_sending else "computed"

    @staticmethod
    def _phase_of_reservation(role: DecodeRole, attempt: Attempt) -> str | None:
        reservation = role._reservations.get(attempt)
        if reservation is None or reservation.sequence is None:
            return None
        is_first = len(reservation.sequence.output_token_ids) == 1
        return "between commit and first decode" if is_first else "decoding"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("cancels"))


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    return Witness(monkeypatch)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_three_hundred_clients_leave_in_every_phase_and_the_next_one_is_served_at_once(
    model: Path, topology: str, witness: Witness
) -> None:
    generator = random.Random(3)
    with WorkerCluster(model, TOPOLOGIES[topology], memory_bytes=6 << 20, batch_tokens=128) as cluster:
        (answer,) = cluster.generate([PROMPT], GREEDY)
        for _ in range(NUM_ROUNDS):
            futures = [
                cluster.submit(prompt_of(generator), GREEDY, leave=LEAVES[index % len(LEAVES)])
                for index in range(NUM_CLIENTS)
            ]
            codes = codes_of(futures)
            assert codes.keys() <= {"client_gone", "length"}
            assert codes["client_gone"] > NUM_CLIENTS // 2
            assert_as_before(cluster, answer)
    assert witness.phases.keys() >= PHASES, f"only these were met: {witness.phases}"


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_three_hundred_clients_leave_in_one_moment_and_the_next_one_is_served_at_once(
    model: Path, topology: str, witness: Witness
) -> None:
    generator = random.Random(5)
    with WorkerCluster(model, TOPOLOGIES[topology], memory_bytes=6 << 20, batch_tokens=128) as cluster:
        (answer,) = cluster.generate([PROMPT], GREEDY)
        for _ in range(NUM_ROUNDS):
            futures = [cluster.submit(prompt_of(generator), ENDLESS) for _ in range(NUM_CLIENTS)]
            cluster.wait_until(lambda: any(rank.load.running for rank in cluster.leaders()))
            cluster.leave_together()
            assert codes_of(futures) == {"client_gone": NUM_CLIENTS}
            assert_as_before(cluster, answer)
    assert {"queued", "decoding"} <= witness.met, f"only these were met: {witness.phases}"


def prompt_of(generator: random.Random) -> list[int]:
    return [generator.randrange(500) for _ in range(generator.choice((1, 20, 200)))]


def codes_of(futures: "list[Future[Answer]]") -> Counter[str]:
    return Counter(answer.outcome.code for answer in (future.result(60) for future in futures) if answer.outcome)


def assert_as_before(cluster: WorkerCluster, answer: list[int]) -> None:
    started_s = time.monotonic()
    assert cluster.generate([PROMPT], GREEDY) == [answer]
    assert time.monotonic() - started_s < SERVED_WITHIN_S
    cluster.assert_pools_whole()
