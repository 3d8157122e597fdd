"""Every family, every topology and every transport answers as transformers does, token for token.

Which family it is makes no difference to what moves its KV, so families are tried on one topology, and one of them on
all.

The real roles, engines, transports and control plane, as threads of one process. Prompts of 1 to 700 tokens, sixteen at
once, half of them with a shared prefix, so that batches are mixed and prefix caches are hit on both sides.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from protocol.messages import RoleName
from protocol.orders import Batch
from protocol.request import SamplingParams
from protocol.topology import Transport
from tests.models import FAMILIES, make_model, reference_model
from tests.sampling import row_of, sample
from tests.worker_cluster import WorkerCluster

NUM_TOKENS = 20
LENGTHS = (1, 2, 15, 16, 17, 32, 63, 100, 205, 256, 257, 333, 400, 512, 699, 700)
SHARED = 208
TOPOLOGIES: dict[str, list[tuple[RoleName, int, int]]] = {
    "colocated": [("colocated", 1, 1)],
    "1P1D": [("prefill", 1, 1), ("decode", 1, 1)],
    "2P2D": [("prefill", 2, 1), ("decode", 2, 1)],
    "TP1-TP2": [("prefill", 1, 1), ("decode", 1, 2)],
    "TP2-TP1": [("prefill", 1, 2), ("decode", 1, 1)],
    "TP2-TP4": [("prefill", 1, 2), ("decode", 1, 4)],
}
CASES = [("colocated", "zmq")]  # nothing crosses there
CASES += [(topology, transport) for topology in TOPOLOGIES if topology != "colocated" for transport in ("zmq", "gloo")]
ONE_HOST_CASES = [(topology, transport) for topology in ("2P2D", "TP2-TP4") for transport in ("shm", "auto")]


class Reference:
    """One family's model, and what transformers says about it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = make_model(family, folder)
        self._model = reference_model(self.folder)
        self.prompts = _prompts()
        self.greedy = [self._greedy(prompt) for prompt in self.prompts]
        self.sampling = [_sampling(seed) for seed in range(4)]
        self.sampled = [
            self._sampled(prompt, params) for prompt, params in zip(self.prompts[4:8], self.sampling, strict=True)
        ]

    @torch.inference_mode()
    def _greedy(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = self._model.generate(ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False)
        return [int(token) for token in output[0, len(prompt) :]]

    @torch.inference_mode()
    def _sampled(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Draw from transformers' logits of the whole text, one token at a time, alone in its batch."""
        output: list[int] = []
        for _ in range(params.max_tokens):
            logits = self._model(torch.tensor([prompt + output])).logits[0, -1:].float()
            output.append(sample(logits, [row_of(params, prompt, output)])[0].token_id)
        return output


def _prompts() -> list[list[int]]:
    generator = random.Random(5)
    shared = [generator.randrange(500) for _ in range(SHARED)]
    prompts = []
    for index, length in enumerate(LENGTHS):
        own = [generator.randrange(500) for _ in range(length)]
        prompts.append((shared + own)[:length] if index % 2 else own)
    return prompts


def _sampling(seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=12, seed=seed, temperature=0.9, top_p=0.95, top_k=50, presence_penalty=0.4, repetition_penalty=1.1
    )


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    return Reference(request.param, tmp_path_factory.mktemp(request.param))


def test_every_familys_tokens_equal_transformers(reference: Reference) -> None:
    _hold_against(reference, "TP2-TP4", "zmq")


@pytest.mark.parametrize("reference", ["qwen3"], indirect=True)
@pytest.mark.parametrize(("topology", "transport"), CASES)
def test_tokens_equal_transformers_on_every_topology(reference: Reference, topology: str, transport: Transport) -> None:
    _hold_against(reference, topology, transport)


@pytest.mark.parametrize("reference", ["llama"], indirect=True)
@pytest.mark.parametrize(("topology", "transport"), ONE_HOST_CASES)
def test_transports_within_one_host_carry_the_same_tokens(
    reference: Reference, topology: str, transport: Transport
) -> None:
    _hold_against(reference, topology, transport)


def _hold_against(reference: Reference, topology: str, transport: Transport) -> None:
    greedy = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    with WorkerCluster(reference.folder, TOPOLOGIES[topology], transport, memory_bytes=24 << 20) as cluster:
        assert cluster.generate(reference.prompts, greedy) == reference.greedy
        assert cluster.generate(reference.prompts[::-1], greedy) == reference.greedy[::-1], "from a warm prefix cache"
        futures = [
            cluster.submit(prompt, params)
            for prompt, params in zip(reference.prompts[4:8], reference.sampling, strict=True)
        ]
        assert [future.result(60).token_ids for future in futures] == reference.sampled
        cluster.assert_pools_whole()


@pytest.mark.parametrize("reference", ["llama"], indirect=True)
@pytest.mark.parametrize("topology", ["colocated", "2P2D", "TP1-TP2"])
def test_a_host_that_is_a_step_ahead_of_its_device_changes_no_token(
    reference: Reference, topology: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_carried = _be_ahead(monkeypatch)
    _hold_against(reference, topology, "zmq")
    assert num_carried() > 16 * NUM_TOKENS, "the host was not ahead"


@pytest.mark.parametrize("reference", ["llama"], indirect=True)
def test_whoever_stops_while_the_next_step_is_under_way_gets_no_token_more(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    _be_ahead(monkeypatch)
    with WorkerCluster(reference.folder, TOPOLOGIES["1P1D"], memory_bytes=24 << 20) as cluster:
        futures = []
        for index, (prompt, answer) in enumerate(zip(reference.prompts, reference.greedy, strict=True)):
            last = answer[index % NUM_TOKENS]
            params = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, stop_token_ids=(last,))
            futures.append((cluster.submit(prompt, params), answer[: answer.index(last) + 1]))
        for future, expected in futures:
            assert future.result(60).token_ids == expected


def _be_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let workers on a CPU do as on a GPU: run ahead, warm up, and fill batches up to the sizes of graphs.

    Only that a graph is captured is not so: what it would repeat is called. Return what tells how many tokens the ranks
    carried over.
    """
    carried: list[int] = []
    original = Engine._carry

    def carry(self: Engine, batch: Batch, token_ids: torch.Tensor, drawn: torch.Tensor | None) -> None:
        carried.append(len(batch.carried))
        original(self, batch, token_ids, drawn)

    monkeypatch.setattr(Engine, "is_asynchronous", True)
    monkeypatch.setattr("engine.engine.cuda_capture", lambda: lambda run: run)
    monkeypatch.setattr(Engine, "_carry", carry)
    return lambda: sum(carried)


@pytest.mark.parametrize("reference", ["llama"], indirect=True)
@pytest.mark.parametrize("block_sizes", [(16, 32), (32, 16), (64, 16)], ids=lambda sizes: f"{sizes[0]}to{sizes[1]}")
def test_tokens_equal_transformers_whatever_the_block_sizes(reference: Reference, block_sizes: tuple[int, int]) -> None:
    greedy = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    topology = TOPOLOGIES["TP2-TP1"]
    with WorkerCluster(reference.folder, topology, memory_bytes=24 << 20, block_sizes=block_sizes) as cluster:
        assert cluster.generate(reference.prompts, greedy) == reference.greedy
        assert cluster.generate(reference.prompts[::-1], greedy) == reference.greedy[::-1], "from a warm prefix cache"
        cluster.assert_pools_whole()
