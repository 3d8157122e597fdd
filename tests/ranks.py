"""Tensor-parallel ranks as threads of one process, joined by gloo over a store in memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from models.tensor_parallel import TensorParallel

Result = TypeVar("Result")
_TIMEOUT = timedelta(seconds=30)


def run_ranks(size: int, work: Callable[[TensorParallel], Result]) -> list[Result]:
    """Run work on every rank of a group at once and return the results by rank; raise what a rank raised."""
    store = dist.HashStore()

    def run(rank: int) -> Result:
        group = dist.ProcessGroupGloo(store, rank, size, _TIMEOUT) if size > 1 else None
        return work(TensorParallel(rank, size, group))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
