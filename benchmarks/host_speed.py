"""`python -m benchmarks.host_speed`: what the host does for one step of decode, with a device that takes no time.

Scheduling, the batch, its tensors, and what is done with every token; without sampling, launches and the router. On a
GPU all of this happens while the device computes the step before, so it must stay well below a step's time. Processor
time of one thread, which a busy machine changes less than time on the wall.
"""

import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.engine_plan import FULL
from benchmarks.engine_speed import BLOCK_SIZE, StepSpeed, Work, layout_of
from engine.batch_tensors import to_tensors
from engine.block_pool import BlockPool
from engine.sampler import Drawn, SamplingRow
from protocol.orders import Batch

NUM_STEPS = 200


class NoDevice:
    """Takes a step's tensors, and has drawn at once."""

    token_ids = None

    def __init__(self, num_rows: int = 0) -> None:
        self._num_rows = num_rows

    def forward(self, batch: Batch, drawn: Any) -> int:
        to_tensors(batch, BLOCK_SIZE, torch.device("cpu"))
        return len(batch.sampled)

    def draw(self, num_rows: int, rows: Sequence[SamplingRow]) -> "NoDevice":
        return NoDevice(num_rows)

    def collect(self) -> list[Drawn]:
        return [Drawn(7, None, is_valid=True)] * self._num_rows


class ProcessorTime:
    """Of this thread, while entered."""

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.seconds = time.thread_time() - self._began


def step_s(work: Work) -> float:
    """Return the host's seconds for one step of this work."""
    device, layout = NoDevice(), layout_of(FULL.model.facts, FULL.dtype)
    pool = BlockPool(work.batch * (work.length + work.batch + NUM_STEPS) // BLOCK_SIZE + work.batch, BLOCK_SIZE)
    speed = StepSpeed(
        device.forward, device.draw, pool, layout, FULL.limits, FULL.model.facts.vocab_size, is_ahead=True
    )
    watch = ProcessorTime()
    speed.watch_decoding(work, NUM_STEPS, watch)
    return watch.seconds / NUM_STEPS


def main() -> None:
    print(f"{platform.machine()}, the host's part of a step, ms of processor time, the best of three")
    for work in FULL.decodes:
        print(f"decode step {work!s:12}{min(step_s(work) for _ in range(3)) * 1e3:8.2f}", flush=True)


if __name__ == "__main__":
    main()
