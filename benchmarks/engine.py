"""`make bench-engine`: what one engine and its kernels do on one device, beside the device's limits and beside peers.

On an NVIDIA GPU the model is of Llama 3.1 8B's shape, and the rows are those of docs/performance.md, measured as the
peers were: a step of decode is (time of n + 1 tokens - time of 1 token) / n, the best of two runs. Elsewhere a tiny
model stands in, to see that everything runs. Limits come from a copy and a matrix product timed in the same run.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_timer import Ceiling, ceiling
from benchmarks.engine_plan import FULL, H200, H200_PEERS, SMOKE, Plan
from benchmarks.engine_speed import Work, engine_speed
from benchmarks.kernel_speed import KernelSpeed, Timed
from kernels.backend import operations_for
from models.spec import ModelSpec


@dataclass(frozen=True)
class Row:
    """One measured row; seconds everywhere. of_floor and of_peer: how often the floor, or the peer, fits in it."""

    name: str
    seconds: float
    rate: str
    floor_seconds: float
    of_floor: float
    peer_seconds: float | None
    of_peer: float | None


def floor_of_decode(model: ModelSpec, itemsize: int, work: Work, best: Ceiling) -> float:
    """Every weight but the embedding is read once, and every sequence's KV."""
    return (num_weights(model) + num_kv_elements(model, work)) * itemsize / best.bytes_per_s


def floor_of_prefill(model: ModelSpec, work: Work, best: Ceiling) -> float:
    """Two operations per weight and token, four per pair of positions, head and dimension."""
    heads = sum(layer.attention.heads.number for layer in model.decoder.layers)
    attention = 2 * work.length**2 * heads * model.facts.head_dim
    return work.batch * (2 * layers_weights(model) * work.length + attention) / best.flops_per_s


def num_weights(model: ModelSpec) -> int:
    """Return how many weights a decode step reads: the layers' matrices and the head."""
    return layers_weights(model) + model.decoder.vocabulary.size * model.decoder.vocabulary.hidden_size


def layers_weights(model: ModelSpec) -> int:
    """Return how many weights the layers' matrices have."""
    return sum(math.prod(shape) for shape in model.decoder.tensors().values() if len(shape) > 1)


def num_kv_elements(model: ModelSpec, work: Work) -> int:
    """Return how many elements the KV of all of work's tokens has."""
    return 2 * model.facts.num_layers * model.facts.num_kv_heads * model.facts.head_dim * work.batch * work.length


class Report:
    """Rows as they come: printed one by one, and written to file, so that a run cut short has told something."""

    def __init__(self, about: dict[str, str], best: Ceiling, file: Path | None) -> None:
        self._peers = H200_PEERS if about["device"].startswith(H200) else {}
        self._content: dict[str, Any] = {"environment": about, "ceiling": asdict(best), "rows": [], "problems": []}
        self._file = file
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        print(f"copy {best.bytes_per_s / 1e12:.3f} TB/s (read + write), products {best.flops_per_s / 1e12:.2f} TFLOP/s")
        print(f"{'':56}{'':>14}{'':>20}{'floor':>14}{'x floor':>9}{'peer':>14}{'x peer':>8}", flush=True)

    def add(self, name: str, elapsed: float, rate: str, floor: float) -> None:
        theirs = self._peers.get(name)
        row = Row(name, elapsed, rate, floor, elapsed / floor, theirs, None if theirs is None else elapsed / theirs)
        peer = f"{shown(theirs):>14}{row.of_peer:8.2f}" if theirs is not None else ""
        print(f"{name:56}{shown(elapsed):>14}{rate:>20}{shown(floor):>14}{row.of_floor:9.2f}{peer}", flush=True)
        self._keep("rows", asdict(row))

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Let what goes wrong here cost no other row."""
        try:
            yield
        except RuntimeError as error:  # of the device, of its memory, or that a library has nothing for this shape
            problem = str(error).partition("\n")[0]
            print(f"{name:56}failed: {problem}", flush=True)
            self._keep("problems", {"name": name, "problem": problem})

    @property
    def has_problems(self) -> bool:
        return bool(self._content["problems"])

    def _keep(self, kind: str, what: dict[str, Any]) -> None:
        self._content[kind].append(what)
        if self._file:
            self._file.write_text(json.dumps(self._content, indent=1) + "\n")


def shown(elapsed: float) -> str:
    return f"{elapsed * 1e3:.2f} ms" if elapsed >= 1e-3 else f"{elapsed * 1e6:.1f} us"


def measure_engine(plan: Plan, device: torch.device, best: Ceiling, report: Report) -> None:
    model = plan.model
    longest = max(work.batch * (work.length + plan.num_steps + 17) for work in plan.decodes + plan.prefills)
    engine = engine_speed(model, plan.dtype, device, plan.limits, longest)
    for work in plan.prefills:
        engine.prefill_s(work)  # warms up
        elapsed = engine.prefill_s(work)
        rate = f"{work.batch * work.length / elapsed:,.0f} tok/s"
        report.add(f"prefill {work}", elapsed, rate, floor_of_prefill(model, work, best))
    for work in plan.decodes:
        elapsed = engine.decode_step_s(work, plan.num_steps)
        floor = floor_of_decode(model, plan.dtype.itemsize, work, best)
        report.add(f"decode step {work}", elapsed, f"{work.batch / elapsed:,.0f} tok/s", floor)


def measure_kernels(plan: Plan, device: torch.device, best: Ceiling, report: Report) -> None:
    rotated_bytes = 2 * plan.dtype.itemsize * plan.copy_elements
    kernels = KernelSpeed(plan.sizes, plan.dtype, device, operations_for(device), rotated_bytes)
    for name, measure in kernel_rows(plan, kernels):
        with report.guarded(name):
            timed = measure()
            floor = max(timed.num_bytes / best.bytes_per_s, timed.num_flops / best.flops_per_s)
            in_bytes = f"{timed.num_bytes / timed.seconds / 1e12:.3f} TB/s"
            in_flops = f"{timed.num_flops / timed.seconds / 1e12:.2f} TFLOP/s"
            report.add(name, timed.seconds, in_flops if timed.num_flops else in_bytes, floor)


def kernel_rows(plan: Plan, kernels: KernelSpeed) -> Iterator[tuple[str, Callable[[], Timed]]]:
    for work in plan.decode_attention:
        yield f"decode attention {work}", partial(kernels.decode_attention, work)
    for chunks in plan.prefill_attention:
        yield f"prefill attention {chunks}", partial(kernels.prefill_attention, chunks)
        if chunks.query_len == chunks.context_len:
            yield f"prefill attention {chunks}, library", partial(kernels.library_attention, chunks)
            yield f"prefill attention {chunks}, library, new length", partial(kernels.library_first_call, chunks)
    for num in plan.num_tokens:
        yield f"add + RMSNorm, {num} tokens", partial(kernels.add_rms_norm, num)
        yield f"RoPE + KV write, {num} tokens", partial(kernels.rope_and_write_kv, num)
        yield f"SiLU x mul, {num} tokens", partial(kernels.silu_mul, num)
        yield f"gather of KV blocks, {num} tokens", partial(kernels.gather_kv, num)
        yield f"scatter of KV blocks, {num} tokens", partial(kernels.scatter_kv, num)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    parser.add_argument("--only", choices=["engine", "kernels"], help="leave out the other half")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = FULL if device.type == "cuda" else SMOKE
    best = ceiling(device, plan.dtype, plan.copy_elements, plan.matrix)
    report = Report(environment(device), best, options.json)
    if options.only != "engine":
        measure_kernels(plan, device, best, report)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if options.only != "kernels":
        with report.guarded("engine"):  # all its rows: requests of a failed one would be in the next ones' way
            measure_engine(plan, device, best, report)
    return 1 if report.has_problems else 0


def environment(device: torch.device) -> dict[str, str]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"commit": git.stdout.strip() or "unknown", "torch": torch.__version__, "device": name}


if __name__ == "__main__":
    sys.exit(main())
