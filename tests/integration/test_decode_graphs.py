"""Batches that are filled up to the size of a graph give what they give alone, whatever ran in those rows before.

Nothing is captured here, for there is no GPU: what a graph would repeat on its tensors is called again on them.
"""

import random

import pytest
import torch

from engine.batch_tensors import to_tensors
from engine.decode_graphs import DecodeGraphs, Scratch, padded_sizes
from engine.engine import Engine
from models.loading import load_model
from models.tensor_parallel import TensorParallel
from protocol.orders import Batch, block_table
from tests.models import layout_of, make_model

CPU = torch.device("cpu")
BLOCK_SIZE, MAX_BLOCKS, MAX_SIZE = 16, 6, 24


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_model("qwen3", tmp_path_factory.mktemp("model"))
    model = load_model(folder)
    layout = layout_of(model.facts, BLOCK_SIZE)
    engine = Engine(model, folder, torch.float32, CPU, TensorParallel(0, 1), layout, kv_memory=8 << 20)
    torch.manual_seed(0)
    for plane in engine.kv_cache.planes:
        plane.normal_()
    return engine


def some_batch(rng: random.Random, num_blocks: int) -> Batch:
    num = rng.randint(1, MAX_SIZE)
    blocks = iter(rng.sample(range(num_blocks), num * MAX_BLOCKS))
    lens = [rng.randint(1, BLOCK_SIZE * MAX_BLOCKS) for _ in range(num)]
    tables = tuple(block_table(next(blocks) for _ in range(-(-length // BLOCK_SIZE))) for length in lens)
    tokens = tuple(rng.randrange(500) for _ in range(num))
    return Batch(tokens, (1,) * num, tuple(lens), tables, tuple(range(num)))


def test_a_filled_up_batch_gives_what_it_gives_alone(engine: Engine) -> None:
    rng = random.Random(3)
    cache = engine.kv_cache
    scratch = Scratch(cache.scratch_block, BLOCK_SIZE, CPU)
    room = torch.full((MAX_SIZE, engine.vocab_size), float("nan"))
    graphs = DecodeGraphs(engine._compute, padded_sizes(MAX_SIZE), MAX_BLOCKS, scratch, room, capture=lambda run: run)
    for _ in range(25):
        batch = some_batch(rng, cache.num_blocks)
        tensors = to_tensors(batch, BLOCK_SIZE, CPU)
        before = [plane.clone() for plane in cache.planes]
        expected = engine.forward(batch)
        written = [plane[:, : cache.num_blocks].clone() for plane in cache.planes]
        for plane, earlier in zip(cache.planes, before, strict=True):
            plane.copy_(earlier)
        assert graphs.can_run(tensors)
        logits = graphs.run(tensors)
        assert logits is not None
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        found = [plane[:, : cache.num_blocks] for plane in cache.planes]
        torch.testing.assert_close(found, written, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "batch",
    [
        Batch((1,) * 3, (1, 2), (5, 9), (block_table([0]), block_table([1])), (0, 2)),  # a prompt's chunk
        Batch((1,) * 2, (1, 1), (5, 9), (block_table([0]), block_table([1])), (1,)),  # a token that is not sampled
        Batch(
            (1,) * 25, (1,) * 25, (5,) * 25, tuple(block_table([n]) for n in range(25)), tuple(range(25))
        ),  # too many
    ],
)
def test_other_batches_are_not_for_graphs(engine: Engine, batch: Batch) -> None:
    scratch = Scratch(engine.kv_cache.scratch_block, BLOCK_SIZE, CPU)
    room = torch.empty(24, engine.vocab_size)
    graphs = DecodeGraphs(engine._compute, [4, 24], MAX_BLOCKS, scratch, room, capture=lambda run: run)
    assert not graphs.can_run(to_tensors(batch, BLOCK_SIZE, CPU))


@pytest.mark.parametrize("max_size", [1, 2, 3, 8, 9, 63, 64, 250, 256, 257, 600])
def test_sizes_waste_little_and_are_few(max_size: int) -> None:
    sizes = padded_sizes(max_size)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_size
    assert len(sizes) <= 50
    for num in range(1, max_size + 1):
        size = next(size for size in sizes if size >= num)
        assert size - num < max(8, num / 2)
