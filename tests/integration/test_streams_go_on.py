"""Streams outlive their workers, token for token: real workers, each a process that is killed, stopped or hangs.

A whole answer is compared with the same request's undisturbed one: tokens, places, log probabilities, end. Every kind
of sampling is among the streams: greedy, seeded with penalties, min_tokens over end tokens, ignore_eos.
"""

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from protocol.identity import new_request_id
from protocol.messages import RoleName
from protocol.request import SamplingParams
from protocol.stages import Stage
from tests.integration.process_cluster import ProcessCluster
from tests.models import make_model
from tests.worker_cluster import Answer

NUM_TOKENS = 64
ENDS = tuple(range(0, 500, 3))
SAMPLING = (
    SamplingParams(NUM_TOKENS, seed=0, temperature=0.0, num_logprobs=2),
    SamplingParams(NUM_TOKENS, seed=1, top_k=50, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.5),
    SamplingParams(NUM_TOKENS, seed=2, temperature=0.8, eos_token_ids=ENDS, min_tokens=NUM_TOKENS - 3, num_logprobs=1),
    SamplingParams(NUM_TOKENS, seed=3, top_p=0.9, eos_token_ids=ENDS, ignore_eos=True),
)
WITHIN_S = 40
NUM_STREAMS = 16

Group = tuple[RoleName, int]


class Scene:
    """A cluster, requests, and what each of them brings when nothing happens."""

    def __init__(self, cluster: ProcessCluster) -> None:
        generator = random.Random(7)
        self.cluster = cluster
        self.prompts = [generator.choices(range(500), k=generator.randint(1, 200)) for _ in range(NUM_STREAMS)]
        self.undisturbed = self.results(self.ask_all())

    def ask_all(self) -> "list[Future[Answer]]":
        """Ask for all streams. The salt is another one each time, so that no prefix cache has a part in it."""
        return [
            self.cluster.submit(prompt, SAMPLING[index % len(SAMPLING)], salt=new_request_id())
            for index, prompt in enumerate(self.prompts)
        ]

    @staticmethod
    def results(futures: "Sequence[Future[Answer]]") -> list[Answer]:
        return [future.result(WITHIN_S) for future in futures]

    def ask_again(self) -> list[Answer]:
        """Ask for all streams while something happens; return the answers, all of them as ever."""
        answers = self.results(self.ask_all())
        self.compare(answers)
        return answers

    def compare(self, answers: Sequence[Answer]) -> None:
        for answer, undisturbed in zip(answers, self.undisturbed, strict=True):
            assert answer.said == undisturbed.said, f"cut at {sorted(answer.cuts)}"
            assert answer.logprobs == pytest.approx(undisturbed.logprobs, abs=1e-3)  # prefill adds in another order


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def scene(model: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    with ProcessCluster(model, request.param, batch_tokens=64) as cluster:
        yield Scene(cluster)


def on(*groups: tuple[RoleName, int, int]) -> pytest.MarkDecorator:
    """Run a test on these groups: role, how many, ranks each."""
    return pytest.mark.parametrize("scene", [list(groups)], indirect=True, ids=[""])


@on(("prefill", 1, 1), ("decode", 4, 1))
def test_decode_may_die_after_any_token(scene: Scene) -> None:
    """In every round three of four groups die, far enough apart that no stream is taken for the cause."""
    cluster, left = scene.cluster, set(range(2, NUM_TOKENS))
    for _ in range(40):
        thirds = [[index for index in left if index // 22 == third] for third in range(3)]
        cluster.last_tokens = {("decode", group): min(third) - 1 for group, third in enumerate(thirds) if third}
        cluster.start_again(("decode", 0), ("decode", 1), ("decode", 2))
        left -= set().union(*(answer.cuts for answer in scene.ask_again()))
        if not left:
            break
    cluster.last_tokens.clear()
    cluster.revive()
    cluster.assert_pools_whole()
    assert not left


@on(("prefill", 2, 1), ("decode", 1, 1))
def test_prefill_may_die_while_it_computes_chunks_or_sends_them(scene: Scene) -> None:
    cluster = scene.cluster
    for moment in range(8):
        futures = scene.ask_all()
        time.sleep(0.01 * moment)
        cluster.kill("prefill", moment % 2)
        scene.compare(scene.results(futures))
        cluster.revive()
    cluster.assert_pools_whole()


@on(("prefill", 1, 1), ("decode", 1, 1))
def test_a_lone_pair_serves_on_when_it_is_back_whoever_of_it_was_lost(scene: Scene) -> None:
    cluster = scene.cluster
    for role in ("decode", "prefill"):
        futures = scene.ask_all()
        cluster.wait_until(lambda: cluster.controller.attempts.stages().count(Stage.DECODING) > 4)
        cluster.kill(role, 0)
        cluster.revive()
        scene.compare(scene.results(futures))
    cluster.assert_pools_whole()


@on(("prefill", 1, 1), ("decode", 2, 2))
def test_one_rank_of_several_is_lost_with_its_group_and_a_stopped_one_like_a_killed_one(scene: Scene) -> None:
    cluster = scene.cluster
    for how, rank in ((signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)):
        futures = scene.ask_all()
        cluster.wait_until(lambda: cluster.controller.attempts.stages().count(Stage.DECODING) > 4)
        os.kill(cluster.pid("decode", rank, rank), how)
        scene.compare(scene.results(futures))
        cluster.start_again(("decode", rank))
    cluster.assert_pools_whole()


@on(("colocated", 2, 1))
def test_colocated_groups_take_over_from_one_another(scene: Scene) -> None:
    cluster = scene.cluster
    for index in (3, 30):
        cluster.last_tokens = {("colocated", index % 2): index}
        cluster.start_again(("colocated", 0), ("colocated", 1))
        assert any(answer.cuts for answer in scene.ask_again())
    cluster.last_tokens.clear()
    cluster.revive()
    cluster.assert_pools_whole()
