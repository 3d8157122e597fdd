"""Trains the demo model from nothing and writes configs/demo_model: weights, tokenizer and a record of the training.

For developers: `python -m tools.demo_model.train --out configs/demo_model`. It takes 15 to 30 minutes on one CPU core,
downloads nothing, and gives the same model for the same seed on the same machine and number of threads.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo_model.corpus import Document, documents, plain_text
from tools.demo_model.tokenizer import END, MAX_LENGTH, VOCABULARY_SIZE, train_tokenizer

TOKENIZER_DOCUMENTS = 6000
VALIDATION_BATCHES = 24
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 40


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    steps: int
    tokens_per_step: int
    context: int
    seed: int
    threads: int


@dataclass(frozen=True)
class Record:
    """How the training went; saved next to the weights."""

    train_loss: float
    validation_loss: float
    steps: int
    tokens: int
    parameters: int
    seconds: int
    seed: int
    threads: int


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model on generated text.")
    parser.add_argument("--out", type=Path, default=Path("configs/demo_model"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--context", type=int, default=512, help="tokens in one training sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return Options(**vars(parser.parse_args()))


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights; 8 query heads share 2 KV heads."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        # The usual 0.02 is meant for wide models; with it, a narrow one takes long to learn to copy names.
        initializer_range=256**-0.5,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """Token ids of a document, from <|begin|> to <|end|>, exactly as the server will see them."""
    if isinstance(document, str):
        return [int(token) for token in tokenizer.encode(document + END)]
    text = str(tokenizer.apply_chat_template(document, tokenize=False))
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


class Batch(NamedTuple):
    """Rows of packed documents; positions count from 0 in each document, which also keeps documents apart."""

    tokens: Tensor
    positions: Tensor


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, context: int) -> Iterator[Batch]:
    """Pack documents end to end into batches of rows of equal length; every document is used once."""
    encoded = (encode(tokenizer, document) for document in documents(seed))
    stream = itertools.chain.from_iterable(zip(tokens, itertools.count(), strict=False) for tokens in encoded)
    while True:
        block = torch.tensor(list(itertools.islice(stream, rows * context))).view(rows, context, 2)
        yield Batch(block[..., 0], block[..., 1])


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean next-token loss of a batch."""
    # Without a cache and with positions that start anew, transformers masks attention across documents.
    output = model(input_ids=batch.tokens, position_ids=batch.positions, labels=batch.tokens, use_cache=False)
    return cast("Tensor", output.loss)


def train(model: LlamaForCausalLM, source: Iterator[Batch], steps: int) -> float:
    """Run the training steps and return the mean loss of the last hundred."""
    optimizer = build_optimizer(model)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(itertools.islice(source, steps), start=1):
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {_mean(losses[-50:]):.3f}  {seconds:.0f} s", flush=True)
    return _mean(losses[-100:])


def evaluate(model: LlamaForCausalLM, source: Iterator[Batch]) -> float:
    """Mean loss on text from a seed that the training does not use."""
    model.train(False)
    with torch.inference_mode():
        return _mean([loss_of(model, batch).item() for batch in itertools.islice(source, VALIDATION_BATCHES)])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: Record, out: Path) -> None:
    """Write everything that serving needs, and the record."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    # Stored in two bytes per number to keep the repository small; the configuration asks for float32 when loading.
    tensors = {name: weight.detach().to(torch.bfloat16) for name, weight in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    stops = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    _write_json(out / "generation_config.json", stops)
    _write_json(out / "training.json", asdict(record))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the tokenizer, then the model, and save both."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    texts = (plain_text(document) for document in itertools.islice(documents(options.seed + 1), TOKENIZER_DOCUMENTS))
    tokenizer = train_tokenizer(texts)
    model = build_model(tokenizer)
    rows = options.tokens_per_step // options.context
    train_loss = train(model, batches(tokenizer, options.seed, rows, options.context), options.steps)
    validation_loss = evaluate(model, batches(tokenizer, options.seed + 2, rows, options.context))
    record = Record(
        train_loss=round(train_loss, 4),
        validation_loss=round(validation_loss, 4),
        steps=options.steps,
        tokens=options.steps * rows * options.context,
        parameters=model.num_parameters(),
        seconds=round(time.monotonic() - started),
        seed=options.seed,
        threads=options.threads,
    )
    save(model, tokenizer, record, options.out)
    print(record)


if __name__ == "__main__":
    main()
