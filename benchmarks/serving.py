"""`make bench`: prefill and decode speed of Tandem colocated, Tandem 1P1D and transformers generate, in one run.

For the demo model and for a random Llama of 100 million parameters. Before anything is timed, every system's greedy
answers are held against transformers' own logits. Rounds are interleaved, medians and ratios are what counts.
"""

import argparse
import os
import platform
import statistics
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.random_llama import ensure_random_llama
from benchmarks.systems import Tandem, Transformers
from benchmarks.workload import Rates, System, measure, prompts_of

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.3}
"""How far below the best logit a greedy token may lie: rounding, never another answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements per system (default 3)")
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks"), help="where the random model is kept")
    arguments = parser.parse_args()
    print(environment())
    _report("demo model", Path("configs/demo_model").resolve(), "float32", arguments.rounds)
    _report(
        "random Llama 100 M",
        ensure_random_llama(arguments.cache / "llama_100m").resolve(),
        "bfloat16",
        arguments.rounds,
    )


def _report(title: str, model: Path, dtype: str, rounds: int) -> None:
    with ExitStack() as running:
        systems: list[System] = [Transformers(model, dtype)]
        systems += [running.enter_context(Tandem(name, topology)) for name, topology in _topologies(model, dtype)]
        for system in systems:
            _check(system, model, dtype)
            measure(system, seed=1)  # warm-up
        results = {system.name: [] for system in systems}
        for index in range(rounds):
            for system in systems:
                results[system.name].append(measure(system, seed=100 * (index + 1)))
    _print_table(f"{title}, {dtype}", results)


def _topologies(model: Path, dtype: str) -> list[tuple[str, dict[str, Any]]]:
    """Both use all cores of this machine; neither is idle while the other is measured, but idle means asleep."""
    cores = os.cpu_count() or 1
    both = {"model": {"path": str(model), "dtype": dtype}, "kv_cache": {"memory": "1GiB"}}
    share = max(1.0, cores / 2)
    return [
        ("Tandem colocated", both | {"colocated": {"cpus": cores}}),
        ("Tandem 1P1D", both | {"prefill": {"cpus": share}, "decode": {"cpus": share}}),
    ]


@torch.inference_mode()
def _check(system: System, model: Path, dtype: str) -> None:
    """Raise unless every greedy token is, up to rounding, the best one after the tokens before it."""
    reference: Any = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = prompts_of(4, 40, seed=7)
    for prompt, answer in zip(prompts, system.generate(prompts, 16), strict=True):
        logits = reference(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        gap = float((logits.max(dim=1).values - chosen).max())
        if len(answer.token_ids) != 16 or gap > TOLERANCES[dtype]:
            raise RuntimeError(f"{system.name} gives wrong answers: {gap} below the best logit")


def _print_table(title: str, results: dict[str, list[Rates]]) -> None:
    print(f"\n{title}: tokens per second, median (ratio to transformers)")
    print(f"{'':24}{'prefill 8x512':>20}{'decode n=1':>20}{'n=8 256/64 total':>20}")
    base = _medians(results["transformers generate"])
    for name, rates in results.items():
        cells = [
            f"{value:,.0f} ({value / reference:.2f}x)" for value, reference in zip(_medians(rates), base, strict=True)
        ]
        print(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def _medians(rates: list[Rates]) -> list[float]:
    columns = [[rate.prefill for rate in rates], [rate.decode_1 for rate in rates], [rate.total_8 for rate in rates]]
    return [statistics.median(column) for column in columns]


def environment() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    commit = git.stdout.strip() or "unknown"
    return (
        f"commit {commit}, torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()} {platform.system()}"
    )


if __name__ == "__main__":
    main()
