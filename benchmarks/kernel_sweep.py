"""`make sweep`: other entries for the table of the Triton kernels' configurations, timed beside the table's own.

For whoever brings another chip, another Triton or other shapes, and then edits kernels/triton/configurations.py by
hand: workers never choose for themselves. Every candidate is compiled first, several at a time; what does not fit the
chip is left out and told. A candidate's figure is the geometric mean, over rows, of its time as a share of the table's.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import environment
from benchmarks.engine_plan import FULL, Plan
from benchmarks.kernel_speed import KernelSpeed
from kernels.backend import operations_for
from kernels.triton import configurations as table
from kernels.triton.configurations import Configuration, padded

NUM_SHOWN = 6
NUM_COMPILERS = 8


@dataclass(frozen=True)
class Trial:
    """What to try in place of one entry of the table, and which of KernelSpeed's rows tell.

    module: the kernel's file, which knows the entry by the name of `constant`. fields: values for some of a
    Configuration's; others: entries that are no Configuration.
    """

    module: str
    constant: str
    rows: tuple[str, ...]
    fields: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    others: tuple[int, ...] = ()


TRIALS = {
    "decode": Trial(
        "attention_decode",
        "ATTENTION_DECODE",
        ("decode_attention",),
        {"tile": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (3, 4, 5, 6)},
    ),
    "programs": Trial("attention_decode", "PROGRAMS_PER_MULTIPROCESSOR", ("decode_attention",), others=(1, 2, 3, 4, 6)),
    "merge": Trial(
        "attention_decode", "SPLIT_MERGE", ("decode_attention",), {"tile": (4, 8, 16, 32), "num_warps": (1, 2, 4)}
    ),
    "prefill": Trial(
        "attention_prefill",
        "ATTENTION_PREFILL",
        ("prefill_attention",),
        {"rows": (64, 128), "tile": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)},
    ),
    "norm": Trial("rms_norm", "RMS_NORM", ("add_rms_norm",), {"rows": (1, 2, 4), "num_warps": (2, 4, 8, 16)}),
    "rope": Trial(
        "rope_and_write_kv", "ROPE", ("rope_and_write_kv",), {"rows": (4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}
    ),
    "gate": Trial("silu_mul", "SILU_MUL", ("silu_mul",), {"tile": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}),
    "copy": Trial(
        "gather_kv", "KV_COPY", ("gather_kv", "scatter_kv"), {"rows": (4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)}
    ),
}


class Entry:
    """The entry of the table that a trial concerns, for one plan's shapes on one device."""

    def __init__(self, trial: Trial, plan: Plan, device: torch.device) -> None:
        itemsize, dims = plan.dtype.itemsize, padded(plan.sizes.head_dim)
        keys = {
            "ATTENTION_DECODE": (itemsize, dims),
            "ATTENTION_PREFILL": (table.chip(device), itemsize, dims),
            "RMS_NORM": padded(plan.sizes.hidden_size),
            "ROPE": dims,
            "KV_COPY": padded(plan.sizes.head_dim * itemsize // 4, least=min(table.KV_COPY)),
        }
        works: dict[str, tuple[Any, ...]] = {
            "decode_attention": plan.decode_attention,
            "prefill_attention": plan.prefill_attention,
        }
        self._trial = trial
        self._module = import_module(f"kernels.triton.{trial.module}")
        self._key = keys.get(trial.constant)
        self.rows = [(row, work) for row in trial.rows for work in works.get(row, plan.num_tokens)]

    @property
    def declared(self) -> Any:
        """What the table has."""
        entry = getattr(table, self._trial.constant)
        return entry if self._key is None else entry[self._key]

    @property
    def candidates(self) -> list[Any]:
        """Return what to try, the declared first."""
        names, values = self._trial.fields.keys(), product(*self._trial.fields.values())
        tried = [
            *self._trial.others,
            *(replace(self.declared, **dict(zip(names, v, strict=True))) for v in values if v),
        ]
        return [self.declared, *(candidate for candidate in tried if candidate != self.declared)]

    @contextmanager
    def replaced(self, candidate: object) -> Iterator[None]:
        """Let launches find candidate in the table."""
        constant = self._trial.constant
        before = getattr(self._module, constant)
        setattr(self._module, constant, candidate if self._key is None else {**before, self._key: candidate})
        try:
            yield
        finally:
            setattr(self._module, constant, before)


@dataclass(frozen=True)
class Result:
    """What a candidate took for each row, in seconds; problem: why it took nothing."""

    candidate: Any
    seconds: tuple[float, ...] = ()
    problem: str = ""

    def of(self, declared: "Result") -> float:
        """Return the geometric mean of the shares of declared's times."""
        pairs = zip(self.seconds, declared.seconds, strict=True)
        return statistics.geometric_mean(ours / theirs for ours, theirs in pairs)

    def shown(self, declared: "Result") -> str:
        """Return only what differs from the table, and how it did."""
        times = "  ".join(f"{each * 1e6:.1f}" for each in self.seconds)
        return f"{self.of(declared):7.3f}  {_difference(self.candidate, declared.candidate):48}{times}"


def _difference(candidate: Any, declared: Any) -> str:
    if candidate == declared:
        return "the table's"
    if not isinstance(candidate, Configuration):
        return str(candidate)
    fields = ("rows", "tile", "num_warps", "num_stages")
    changed = [name for name in fields if getattr(candidate, name) != getattr(declared, name)]
    return ", ".join(f"{name} {getattr(candidate, name)}" for name in changed)


class Sweep:
    """Times entries on one device. until: when to stop, by time.monotonic()."""

    def __init__(self, plan: Plan, device: torch.device, until: float = float("inf")) -> None:
        self._plan = plan
        self._device = device
        self._until = until
        rotated_bytes = 2 * plan.dtype.itemsize * plan.copy_elements
        triton = operations_for(torch.device("cuda"))
        self._speed = KernelSpeed(plan.sizes, plan.dtype, device, triton, rotated_bytes)

    def entry(self, name: str) -> Entry:
        return Entry(TRIALS[name], self._plan, self._device)

    def results(self, name: str, candidates: list[Any]) -> Iterator[Result]:
        """Yield a result for each candidate, as far as time goes."""
        if time.monotonic() > self._until:
            return
        for candidate, problem in zip(candidates, self._problems(name, candidates), strict=True):
            if time.monotonic() > self._until:
                return
            yield Result(candidate, problem=problem) if problem else self.timed(self.entry(name), candidate)

    def timed(self, entry: Entry, candidate: Any) -> Result:
        with entry.replaced(candidate):
            return Result(candidate, tuple(getattr(self._speed, method)(work).seconds for method, work in entry.rows))

    def problem(self, entry: Entry, candidate: Any) -> str:
        """Launch the first rows only; return what is wrong, or "". Machine code is in Triton's cache on disk then."""
        try:
            with entry.replaced(candidate):
                for method, work in dict(reversed(entry.rows)).items():
                    getattr(self._speed, method)(work)
        except Exception as error:  # of Triton, its assembler or the driver: all mean that this one will not do
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def _problems(self, name: str, candidates: list[Any]) -> list[str]:
        """Compile all of them; on a GPU, where that takes seconds each, in several processes."""
        if self._device.type != "cuda":
            return [self.problem(self.entry(name), candidate) for candidate in candidates]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(NUM_COMPILERS, context) as pool:
            return list(pool.map(_problem_on_gpu, [name] * len(candidates), candidates))


def _problem_on_gpu(name: str, candidate: Any) -> str:
    sweep = Sweep(replace(FULL, copy_elements=0), torch.device("cuda"))
    return sweep.problem(sweep.entry(name), candidate)


def told(name: str, rows: list[str], results: list[Result]) -> Iterator[str]:
    """Yield the table's line and the best others', then what did not work."""
    declared, *others = [result for result in results if not result.problem]
    best = sorted(others, key=lambda result: result.of(declared))[:NUM_SHOWN]
    yield f"\n{name}: times in us for {', '.join(rows)}"
    yield from (result.shown(declared) for result in (declared, *best))
    yield from (
        f"   none  {_difference(result.candidate, declared.candidate):48}{result.problem}"
        for result in results
        if result.problem
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", choices=TRIALS, default=list(TRIALS), help="all of them by default")
    parser.add_argument("--seconds", type=float, default=480, help="start nothing after that time")
    parser.add_argument("--json", type=Path, help="write every time to this file too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU, and torch finds none")
    device = torch.device("cuda")
    sweep = Sweep(FULL, device, time.monotonic() + options.seconds)
    content: dict[str, Any] = {"environment": environment(device)}
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))
    for name in options.entries:
        entry = sweep.entry(name)
        rows = [f"{method} {work}" for method, work in entry.rows]
        results = list(sweep.results(name, entry.candidates))
        if not results:
            print(f"\n{name}: no time left")
            continue
        print("\n".join(told(name, rows, results)), flush=True)
        content[name] = {"rows": rows, "results": [asdict(result) for result in results]}
        if options.json:
            options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
