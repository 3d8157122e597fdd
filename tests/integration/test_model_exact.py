"""The engine against transformers: the same greedy tokens for every family, batch shape and tensor-parallel size."""

import random
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from models.loading import load_model
from models.tensor_parallel import TensorParallel
from protocol.errors import ConfigError
from protocol.orders import Batch, block_table
from tests.models import FAMILIES, layout_of, make_model, reference_logits, reference_tokens
from tests.ranks import run_ranks

NUM_NEW_TOKENS = 8
PROMPT_LENGTHS = (1, 2, 16, 45, 140)
CPU = torch.device("cpu")
Tokens = dict[int, list[int]]  # by the length of the prompt


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@dataclass
class Text:
    """A prompt that grows by one greedy token at a time."""

    token_ids: list[int]
    blocks: tuple[int, ...]
    num_computed: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.output) == NUM_NEW_TOKENS

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids) - len(self.output)

    def take(self, max_tokens: int) -> tuple[int, ...]:
        chunk = self.token_ids[self.num_computed : self.num_computed + max_tokens]
        self.num_computed += len(chunk)
        return tuple(chunk)

    def append(self, token_id: int) -> None:
        self.output.append(token_id)
        self.token_ids.append(token_id)


def make_prompts(vocab_size: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]


def make_texts(vocab_size: int, engine: Engine) -> list[Text]:
    """Give every text as many blocks as it can need, out of a shuffled pool."""
    cache = engine.kv_cache
    pool = iter(random.Random(4).sample(range(cache.num_blocks), cache.num_blocks))
    num_blocks = [-(-(length + NUM_NEW_TOKENS) // cache.block_size) for length in PROMPT_LENGTHS]
    tables = [tuple(next(pool) for _ in range(number)) for number in num_blocks]
    return [Text(prompt, table) for prompt, table in zip(make_prompts(vocab_size), tables, strict=True)]


def next_batch(running: list[Text], chunk_tokens: int) -> tuple[Batch, list[Text]]:
    """Return a batch with a chunk of every running text, and the texts that it brings to their next token."""
    chunks = sorted(((text, text.take(chunk_tokens)) for text in running), key=lambda chunk: len(chunk[1]) > 1)
    sampled = [index for index, (text, _) in enumerate(chunks) if text.num_computed == len(text.token_ids)]
    ends = list(accumulate(len(chunk) for _, chunk in chunks))
    batch = Batch(
        token_ids=tuple(token for _, chunk in chunks for token in chunk),
        query_lens=tuple(len(chunk) for _, chunk in chunks),
        context_lens=tuple(text.num_computed for text, _ in chunks),
        block_tables=tuple(block_table(text.blocks) for text, _ in chunks),
        sampled=tuple(ends[index] - 1 for index in sampled),
    )
    return batch, [chunks[index][0] for index in sampled]


def generate(engine: Engine, texts: list[Text], chunk_tokens: int, expected: Tokens) -> None:
    """Run all texts to their end; one more begins at each step, so that prompts and single tokens share batches.

    Ranks other than 0 see no logits and go on with the expected tokens.
    """
    num_begun = 0
    while not all(text.is_done for text in texts):
        num_begun += 1
        batch, advanced = next_batch([text for text in texts[:num_begun] if not text.is_done], chunk_tokens)
        logits = engine.forward(batch)
        for row, text in enumerate(advanced):
            known = expected[text.num_prompt_tokens][len(text.output)]
            text.append(known if logits is None else int(logits[row].argmax()))


def run_engine(group: TensorParallel, folder: Path, block_size: int, chunk_tokens: int, expected: Tokens) -> Tokens:
    model = load_model(folder)
    engine = Engine(
        model, folder, torch.float32, CPU, group, layout_of(model.facts, block_size, group.size), kv_memory=8 << 20
    )
    for plane in engine.kv_cache.planes:
        plane.fill_(torch.nan)  # what an earlier owner left in a block must not matter
    texts = make_texts(model.facts.vocab_size, engine)
    generate(engine, texts, chunk_tokens, expected)
    return {text.num_prompt_tokens: text.output for text in texts}


def expected_tokens(folder: Path) -> Tokens:
    prompts = make_prompts(load_model(folder).facts.vocab_size)
    return {len(prompt): reference_tokens(folder, prompt, NUM_NEW_TOKENS) for prompt in prompts}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokens]:
    folder = make_model(request.param, tmp_path_factory.mktemp(request.param))
    return folder, expected_tokens(folder)


@pytest.mark.parametrize(("size", "chunk_tokens"), [(1, 1000), (1, 13), (2, 1000), (4, 13)])
def test_greedy_tokens_are_those_of_transformers(family: tuple[Path, Tokens], size: int, chunk_tokens: int) -> None:
    folder, expected = family
    work = partial(run_engine, folder=folder, block_size=16, chunk_tokens=chunk_tokens, expected=expected)
    assert run_ranks(size, work)[0] == expected


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied Llama": ("llama", {"tie_word_embeddings": True}),
    "untied Qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one KV head": ("llama", {"num_key_value_heads": 1}),
    "no grouped heads": ("qwen3", {"num_key_value_heads": 4}),
    "heads of 256": ("mistral", {"head_dim": 256, "num_hidden_layers": 2}),
    "many files": ("qwen3", {"max_shard_size": "200KB"}),
    "a vocabulary with an empty shard": ("llama", {"vocab_size": 9}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 4])
def test_variants_give_the_tokens_of_transformers(variant: str, size: int, tmp_path: Path) -> None:
    name, overrides = VARIANTS[variant]
    folder = make_model(name, tmp_path, seed=1, **overrides)
    expected = expected_tokens(folder)
    work = partial(run_engine, folder=folder, block_size=32, chunk_tokens=50, expected=expected)
    assert run_ranks(size, work)[0] == expected


@pytest.mark.parametrize("block_size", [16, 128])
def test_logits_at_every_position_agree_within_noise(block_size: int, tmp_path: Path) -> None:
    """Positions far beyond llama3's original context, in chunks and one by one."""
    folder = make_model("llama3_rope", tmp_path)
    model = load_model(folder)
    engine = Engine(
        model, folder, torch.float32, CPU, TensorParallel(0, 1), layout_of(model.facts, block_size), kv_memory=16 << 20
    )
    rng = random.Random(5)
    token_ids = [rng.randrange(model.facts.vocab_size) for _ in range(400)]
    expected = reference_logits(folder, token_ids)
    table = tuple(rng.sample(range(engine.kv_cache.num_blocks), -(-400 // block_size)))
    start = 0
    for end in (100, 101, 102, 230, 399, 400):
        wanted = tuple(range(end - start))
        batch = Batch(tuple(token_ids[start:end]), (end - start,), (end,), (block_table(table),), wanted)
        logits = engine.forward(batch)
        assert logits is not None
        torch.testing.assert_close(logits, expected[start:end], atol=1e-4, rtol=1e-4)
        start = end


def test_only_the_leader_has_logits_and_only_of_sampled_rows(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    model = load_model(folder)

    def shapes(group: TensorParallel) -> list[tuple[int, ...] | None]:
        layout = layout_of(model.facts, 16, group.size)
        engine = Engine(model, folder, torch.float32, CPU, group, layout, kv_memory=1 << 20)
        batches = (
            Batch((1, 2, 3), (1, 2), (1, 2), (block_table([0]), block_table([1])), sampled)
            for sampled in ((), (2,), (0, 2))
        )
        return [None if logits is None else tuple(logits.shape) for logits in map(engine.forward, batches)]

    leader, follower = run_ranks(2, shapes)
    assert leader == [(0, 515), (1, 515), (2, 515)]
    assert follower == [None, None, None]


@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_stays_close_to_float32(size: int, tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path, initializer_range=0.05)
    model = load_model(folder)
    token_ids = make_prompts(model.facts.vocab_size)[3]

    def compute(group: TensorParallel) -> torch.Tensor | None:
        layout = layout_of(model.facts, 16, size, "bfloat16")
        engine = Engine(model, folder, torch.bfloat16, CPU, group, layout, kv_memory=1 << 20)
        return engine.forward(Batch(tuple(token_ids), (45,), (45,), (block_table([2, 0, 1]),), (44,)))

    logits, *others = run_ranks(size, compute)
    expected = reference_logits(folder, token_ids)[-1]
    assert logits is not None
    assert logits.dtype == torch.float32
    assert torch.cosine_similarity(logits[0], expected, dim=0) > 0.99
    assert others == [None] * (size - 1)


def new_engine(folder: Path, kv_memory: int) -> Engine:
    model = load_model(folder)
    return Engine(model, folder, torch.float32, CPU, TensorParallel(0, 1), layout_of(model.facts, 16), kv_memory)


def test_a_model_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, num_attention_heads=6, hidden_size=96, num_key_value_heads=3)

    def build(group: TensorParallel) -> None:
        model = load_model(folder)
        Engine(model, folder, torch.float32, CPU, group, layout_of(model.facts, 16, 2), kv_memory=1 << 20)

    with pytest.raises(ConfigError, match="3 KV heads cannot be split over 2 ranks"):
        run_ranks(2, build)


def test_a_memory_budget_below_one_block_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="one block takes 24576 bytes"):
        new_engine(folder, kv_memory=24575)


def test_a_memory_budget_beyond_the_machines_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="cpu has no memory for 45812984490 KV blocks; lower kv_cache.memory"):
        new_engine(folder, kv_memory=1 << 50)


def test_a_block_table_too_short_for_its_context_is_refused(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path)
    engine = new_engine(folder, kv_memory=1 << 20)
    with pytest.raises(ValueError, match="sequence 0 has 17 tokens and 1 blocks of 16; it needs 2"):
        engine.forward(Batch((1,), (1,), (17,), (block_table([0]),), (0,)))
