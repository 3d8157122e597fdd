"""`python -m benchmarks.step_profile`: where the time of one decode step goes, kernel by kernel.

On an NVIDIA GPU a step of batch 64 at context 1k of Llama 3.1 8B's shape, whole: scheduling to tokens on the host. What
a kind of kernel cannot beat is shown beside it where that is known: products read every weight once, attention every
sequence's KV. Elsewhere a tiny model stands in, to see that everything runs; operations in C do not show there.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device_timer import Ceiling, ceiling
from benchmarks.engine import environment, num_kv_elements, num_weights
from benchmarks.engine_plan import FULL, SMOKE, Plan
from benchmarks.engine_speed import StepSpeed, Work, engine_speed

NUM_STEPS = 20
KINDS = {
    "attention": ("_attend_split", "_merge_splits", "scaled_dot_product"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "linear"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel, or an operation on a CPU, in one step."""

    name: str
    num_calls: float
    microseconds: float

    @property
    def kind(self) -> str:
        return next((kind for kind, marks in KINDS.items() if any(m in self.name.lower() for m in marks)), "other")


def profiled(engine: StepSpeed, work: Work, device: torch.device) -> list[Kernel]:
    """Return what one step launches, the longest first."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    watch = profile(activities=[activity])
    engine.watch_decoding(work, NUM_STEPS, watch)
    kernels = [
        Kernel(event.key, event.count / NUM_STEPS, own / NUM_STEPS)
        for event in watch.key_averages()
        if (own := event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)
    ]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def floors(plan: Plan, work: Work, best: Ceiling) -> dict[str, float]:
    """Return the microseconds that a kind of kernel takes at least."""
    weights, kv = num_weights(plan.model), num_kv_elements(plan.model, work)
    num_bytes = {"products": weights * plan.dtype.itemsize, "attention": kv * plan.dtype.itemsize}
    return {kind: 1e6 * count / best.bytes_per_s for kind, count in num_bytes.items()}


def lines(kernels: list[Kernel], least: dict[str, float]) -> Iterator[str]:
    total = sum(kernel.microseconds for kernel in kernels)
    yield f"{'us a step':>10}{'share':>8}{'calls':>8}  kernel"
    for kernel in kernels:
        share = kernel.microseconds / total
        yield f"{kernel.microseconds:10.1f}{share:8.1%}{kernel.num_calls:8.1f}  {kernel.name[:90]}"
    for kind in (*KINDS, "other"):
        of_kind = sum(kernel.microseconds for kernel in kernels if kernel.kind == kind)
        floor = f", floor {least[kind]:.0f} us ({least[kind] / of_kind:.0%} of it)" if kind in least and of_kind else ""
        yield f"{of_kind:10.1f}{of_kind / total:8.1%}          all {kind}{floor}"
    yield f"{total:10.1f}{1:8.1%}          all kernels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, work = (FULL, Work(64, 1024)) if device.type == "cuda" else (SMOKE, SMOKE.decodes[-1])
    best = ceiling(device, plan.dtype, plan.copy_elements, plan.matrix)
    num_kv_tokens = work.batch * (work.length + NUM_STEPS + work.batch + 17)
    engine = engine_speed(plan.model, plan.dtype, device, plan.limits, num_kv_tokens)
    engine.prefill_s(work)  # warms up
    kernels, least = profiled(engine, work, device), floors(plan, work, best)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()), f"decode step {work}", sep=", ")
    print("\n".join(lines(kernels, least)))
    if options.json:
        content = {"environment": environment(device), "work": str(work), "floors_us": least}
        options.json.write_text(json.dumps(content | {"kernels": [asdict(k) for k in kernels]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
