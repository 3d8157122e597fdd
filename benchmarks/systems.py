"""The systems that are measured: transformers' generate in this process, and a real Tandem cluster over HTTP."""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from benchmarks.workload import Answer

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 300.0


class Transformers:
    """LlamaForCausalLM.generate on all cores, one batch per call."""

    name = "transformers generate"

    def __init__(self, model: Path, dtype: str) -> None:
        logging.disable_progress_bar()
        self._model: Any = LlamaForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self._model.generation_config.eos_token_id = None  # no answer ends early, here as there

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
        """Time one token first, then all of them: generate itself does not say when a token was ready."""
        first_s, _ = self._timed(prompts, 1)
        total_s, outputs = (first_s, _) if num_tokens == 1 else self._timed(prompts, num_tokens)
        return [Answer(output, first_s, total_s) for output in outputs]

    @torch.inference_mode()
    def _timed(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[list[int]]]:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - started, output[:, ids.shape[1] :].tolist()


class Tandem:
    """A cluster of one topology, started as a user starts it. A context manager."""

    def __init__(self, name: str, topology: dict[str, Any]) -> None:
        self.name = name
        self._model = topology["model"]["path"]
        self._topology = topology | {"router": {"port": 0}}
        self._folder = tempfile.TemporaryDirectory()
        self._clients = ThreadPoolExecutor(16)

    def __enter__(self) -> "Tandem":
        config = Path(self._folder.name) / "topology.yaml"
        config.write_text(json.dumps(self._topology))  # JSON is YAML
        command = [sys.executable, "-m", "cluster", "up", str(config)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._address = self._await_ready().removeprefix("http://")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._clients.shutdown()
        self._folder.cleanup()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
        """One streamed completion per prompt, all at once."""
        started = time.perf_counter()
        return list(self._clients.map(lambda prompt: self._complete(prompt, num_tokens, started), prompts))

    def _complete(self, prompt: list[int], num_tokens: int, started: float) -> Answer:
        """Ask with the leanest client there is: what it costs, it takes from the cores that are measured."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        token_ids, times = [], []
        with closing(HTTPConnection(self._address, timeout=REQUEST_TIMEOUT_S)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith((b"data: {", b"{")):
                    new = _token_ids(json.loads(line.removeprefix(b"data: ")))
                    token_ids += new
                    times += [time.perf_counter() - started] * len(new)
        return Answer(token_ids, times[0], times[-1])

    def _await_ready(self) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        for line in self._process.stdout:
            if line.startswith("ready: "):
                return line.split()[1]
            if time.monotonic() > deadline:
                break
        raise RuntimeError(f"{self.name} did not become ready")


def _token_ids(chunk: dict[str, Any]) -> list[int]:
    if "error" in chunk:
        raise RuntimeError(chunk["error"]["message"])
    choices = chunk["choices"]
    return choices[0].get("token_ids") or [] if choices else []
