"""Starts the real router process for tests, over a tiny model folder without weights. Used by test_router_*.py."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from protocol.topology import RouterSection
from router.launch import Addresses, GroupSpec, RouterLaunch
from tests.members import SECRET

REPOSITORY = Path(__file__).parents[2]
CORPUS = ["the quick brown fox jumps over the lazy dog", "one two three four five six seven eight nine ten", "日本 😀"]
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 400
MAX_CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and loop.index > 1 %}"
    "{{ raise_exception('only the first message may be of the system') }}{% endif %}"
    "<|user|>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONE_PAIR = (GroupSpec("prefill", 0), GroupSpec("decode", 0))


def tiny_tokenizer() -> Tokenizer:
    """Byte-level, so that every character has tokens, some of them only parts of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_model(folder: Path, with_tokenizer: bool = True) -> Path:
    """Write what the router reads of a model."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_CONTEXT,
        "eos_token_id": 0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if with_tokenizer:
        tiny_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|end|>"}))
    return folder


class RouterUnderTest:
    """`python -m router` with its stdin and stdout in our hands; ended on exit."""

    def __init__(self, folder: Path, groups: tuple[GroupSpec, ...] = ONE_PAIR, **section: object) -> None:
        launch = RouterLaunch(
            section=msgspec.convert({"port": 0, "grace_s": 5.0, "canary_s": 0, **section}, RouterSection),
            control_host="127.0.0.1",
            model_folder=str(folder),
            model_name="tiny",
            max_context=MAX_CONTEXT,
            vocab_size=VOCAB_SIZE,
            groups=groups,
            secret=SECRET,
        )
        self.log = folder / f"router-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "router"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=REPOSITORY,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        addresses = msgspec.json.decode(line, type=Addresses)
        self.control, self.url = addresses.control, addresses.http
        self.client = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def __enter__(self) -> "RouterUnderTest":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def status(self) -> dict[str, object]:
        return dict(self.client.get("/status").json())

    def await_ready(self) -> "RouterUnderTest":
        wait_until(lambda: self.client.get("/ready").status_code == 200)
        return self


def counted(router: RouterUnderTest, metric: str, label: str) -> dict[str, float]:
    """Return a counter of /metrics by the values of one of its labels."""
    lines = [line for line in router.client.get("/metrics").text.splitlines() if line.startswith(f"{metric}_total{{")]
    return {line.split(f'{label}="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


def drops(router: RouterUnderTest) -> dict[str, float]:
    return counted(router, "tandem_dropped_messages", "reason")


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Return how long it took; fail when it never came true."""
    started_s = time.monotonic()
    while not is_true():
        assert time.monotonic() - started_s < timeout_s, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - started_s
