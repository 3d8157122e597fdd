"""The engine on a device that is late wherever CUDA may be late: token for token what a CPU gives, without a wait.

Every seed is another order in which the device's streams are served; see tests/pretend_cuda. Whole workers on it are in
test_pretended_workers.py.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from engine import batch_tensors
from engine.host_copy import HostCopy
from engine.limits import ShareOfFree
from engine.sampler import Drawn
from protocol.errors import ConfigError
from protocol.orders import Batch, block_table
from protocol.request import SamplingParams
from tests.models import make_model
from tests.pretend_cuda.device import TOTAL_BYTES, PretendCuda, pretended
from tests.pretend_cuda.operations import IS_INTERPRETED, note_compilations, use_kernels
from tests.pretend_cuda.serving import BLOCK_SIZE, LIMITS, Text, new_engine, new_loop, serve

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the place of torch.cuda is taken")

SEEDS = range(4)
NUM_TOKENS = 9
MANY_STEPS = 90
SAMPLINGS = [
    SamplingParams(NUM_TOKENS, seed=0, temperature=0.0),
    SamplingParams(NUM_TOKENS, seed=7, temperature=0.9, top_p=0.9, top_k=40, min_p=0.01),
    SamplingParams(NUM_TOKENS, seed=3, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    SamplingParams(NUM_TOKENS, seed=5, temperature=0.7, num_logprobs=3, logit_bias={4: 2.0, 9: -3.0}),
    SamplingParams(NUM_TOKENS, seed=6, temperature=0.0, repetition_penalty=1.2, num_logprobs=0),
    SamplingParams(NUM_TOKENS, seed=8, temperature=1.3, min_tokens=3, stop_token_ids=tuple(range(0, 500, 3))),
]


def some_texts(seed: int) -> list[Text]:
    rng = random.Random(seed)
    return [
        Text(
            tuple(rng.randrange(500) for _ in range(rng.choice([1, 2, 7, 16, 17, 40, 60]))),
            SAMPLINGS[index % len(SAMPLINGS)],
            leaves=rng.choice([None, None, 1, 4]),
        )
        for index in range(4 if IS_INTERPRETED else 12)
    ]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=2)


@pytest.fixture(scope="module")
def answers(model: Path) -> dict[int, list[Drawn]]:
    return serve(new_engine(model, "cpu"), some_texts(1))


@pytest.fixture(params=SEEDS)
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with pretended(monkeypatch, request.param) as device:
        use_kernels(monkeypatch, device)
        yield device


def assert_same(found: dict[int, list[Drawn]], wanted: dict[int, list[Drawn]]) -> None:
    for index, draws in wanted.items():
        assert [drawn.token_id for drawn in found[index]] == [drawn.token_id for drawn in draws], index
        for one, other in zip(found[index], draws, strict=True):
            assert (one.is_valid, one.logprobs is None) == (True, other.logprobs is None)
            if one.logprobs and other.logprobs:
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-3)


def test_tokens_are_those_of_a_cpu_and_no_step_waits_for_the_device(
    cuda: PretendCuda, model: Path, answers: dict[int, list[Drawn]]
) -> None:
    engine = new_engine(model, "cuda")
    with cuda.timeline.no_waiting():
        assert_same(serve(engine, some_texts(1)), answers)


def some_batch(rng: random.Random, num_blocks: int) -> Batch:
    """Single tokens of as many contexts as a step may have, or fewer, whose blocks are their own."""
    num = rng.randint(1, LIMITS.batch_requests)
    free = rng.sample(range(num_blocks), num_blocks)
    lens = [rng.randint(1, BLOCK_SIZE * 3) for _ in range(num)]
    tables = tuple(block_table(free.pop() for _ in range(-(-length // BLOCK_SIZE))) for length in lens)
    return Batch(tuple(rng.randrange(500) for _ in range(num)), (1,) * num, tuple(lens), tables, tuple(range(num)))


def test_graphs_of_all_sizes_give_what_a_cpu_gives_whichever_ran_before(cuda: PretendCuda, model: Path) -> None:
    here, there = (new_engine(model, device, 500 << 10) for device in ("cpu", "cuda"))
    num_blocks = here.kv_cache.num_blocks
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(here.kv_cache.planes, there.kv_cache.planes, strict=True):
        ours.copy_(torch.randn(ours.shape, generator=generator))
        theirs.copy_(ours)
    rng = random.Random(2)
    batches = [some_batch(rng, num_blocks) for _ in range(12)]
    with cuda.timeline.no_waiting():  # all are launched before the first is looked at
        launched = [HostCopy(there.forward(batch)) for batch in batches]
    for batch, copy in zip(batches, launched, strict=True):
        torch.testing.assert_close(copy.wait()[0], here.forward(batch), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(here.kv_cache.planes, there.kv_cache.planes, strict=True):
        torch.testing.assert_close(theirs.cpu()[:, :num_blocks], ours[:, :num_blocks], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuda", [1], indirect=True)
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_graphs_of_all_sizes_take_no_more_memory_than_the_largest(
    cuda: PretendCuda, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken() -> int:
        before, _ = torch.cuda.mem_get_info()
        engine = new_engine(model, "cuda", 500 << 10)
        torch.cuda.empty_cache()
        after, _ = torch.cuda.mem_get_info()
        del engine
        return before - after

    with_all = taken()
    monkeypatch.setattr("engine.engine.padded_sizes", lambda most: [most])
    assert 0 < with_all <= taken()


@pytest.mark.parametrize("cuda", [1], indirect=True)
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_step_for_which_memory_runs_out_ends_its_newest_request_only(cuda: PretendCuda, model: Path) -> None:
    """In every step another allocation fails, from the first to the last; short texts come all the time to be ended."""
    long = [
        Text((index, 7, 9), replace(SAMPLINGS[kind], max_tokens=MANY_STEPS)) for index, kind in enumerate((2, 4, 1))
    ]
    short = [Text((index, 2), replace(SAMPLINGS[2], max_tokens=1)) for index in range(2 * MANY_STEPS)]
    answers = serve(new_engine(model, "cpu"), long)
    loop, role = new_loop(new_engine(model, "cuda", 500 << 10), long + short)
    step = 0
    while role.num_admitted <= len(long) or set(role.running.values()) & {0, 1, 2}:
        if role.num_admitted > len(long):
            cuda.allocator.fail_after = step
            step += 1
        loop.step()
    assert not {0, 1, 2} & set(role.failed)
    assert len(role.failed) > MANY_STEPS // 3
    assert cuda.allocator.fail_after is not None, "a step takes memory more often than there were steps"
    assert_same(role.drawn, answers)


@pytest.mark.parametrize("cuda", [0], indirect=True)
@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_kv_takes_its_share_of_what_everything_else_leaves_and_steps_find_their_room(
    cuda: PretendCuda, model: Path, answers: dict[int, list[Drawn]], share: float
) -> None:
    engine = new_engine(model, "cuda", ShareOfFree(share))
    weights = (model / "model.safetensors").stat().st_size
    num_bytes = sum(plane.nbytes for plane in engine.kv_cache.planes)
    assert 0.8 * share < num_bytes / (TOTAL_BYTES - weights) < share
    assert_same(serve(engine, some_texts(1)), answers)


@pytest.mark.parametrize("cuda", [0], indirect=True)
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_start_for_which_memory_runs_out_anywhere_says_what_to_lower(cuda: PretendCuda, model: Path) -> None:
    texts = set()
    for num_taken in range(0, 400, 13):
        cuda.allocator.fail_after = num_taken
        with pytest.raises(ConfigError) as caught:
            new_engine(model, "cuda", ShareOfFree(0.5))
        texts.add(str(caught.value).partition("memory")[0])
    assert len(texts) >= 3


@pytest.mark.skipif(IS_INTERPRETED, reason="it is this test that starts the interpreter")
def test_the_same_holds_of_triton_s_own_kernels() -> None:
    """In a process of its own, where they are interpreted: one engine, and KV on its way over zmq."""
    pytest.importorskip("triton", minversion="3.7")  # the interpreter of 3.6 fails with NumPy from 2.4 on
    folder = Path(__file__).parent
    names = [
        "test_pretended_gpu.py::test_tokens_are_those_of_a_cpu_and_no_step_waits_for_the_device[qwen3-1]",
        "test_device_staging.py::test_kv_of_a_gpu_arrives_byte_for_byte[1-1-2-zmq]",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(folder / name) for name in names)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, env=environment, cwd=folder.parents[1], capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled there")
@pytest.mark.usefixtures("fresh_chip")
@pytest.mark.parametrize("cuda", [1], indirect=True)
def test_no_step_waits_for_a_compilation(cuda: PretendCuda, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = note_compilations(monkeypatch)
    engine = new_engine(model, "cuda")
    warmed_up = set(noted)
    assert len(warmed_up) > 8
    serve(engine, some_texts(1))
    assert noted - warmed_up == set()


def read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostCopy, "wait", lambda copy: copy._tensors)


def upload_through_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: dict[tuple[object, torch.dtype], torch.Tensor] = {}

    def upload_carelessly(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        if device.type == "cpu":
            return tensors
        key = torch.cuda.current_stream(), tensors[0].dtype
        room = buffers.setdefault(key, torch.empty(4096, dtype=key[1], pin_memory=True))
        packed = torch.cat([tensor.flatten() for tensor in tensors])
        there = room[: len(packed)].copy_(packed).to(device, non_blocking=True)
        parts = torch.split(there, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    monkeypatch.setattr(batch_tensors, "upload", upload_carelessly)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("plant", [read_at_once, upload_through_one_buffer])
def test_a_planted_mistake_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    model: Path,
    answers: dict[int, list[Drawn]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    assert any(goes_wrong(seed, model, answers, monkeypatch) for seed in SEEDS)


def goes_wrong(seed: int, model: Path, answers: dict[int, list[Drawn]], monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as patch, pretended(patch, seed) as cuda:
        use_kernels(patch, cuda)
        try:
            assert_same(serve(new_engine(model, "cuda"), some_texts(1)), answers)
        except (AssertionError, RuntimeError):
            return True
    return False
