"""Memory that runs out on a CPU costs one request, as on a GPU: torch's and numpy's own errors, and what is none."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.out_of_memory import naming_lack_of_memory
from engine.rank import Rank, Stationary
from protocol.orders import Batch

TOO_MUCH = 1 << 50
ALLOCATIONS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(TOO_MUCH, dtype=torch.int8),
    "numpy": lambda: np.empty(TOO_MUCH, np.int8),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_step_that_finds_no_memory_says_so_in_the_one_way_that_is_shed(name: str):
    engine: Any = SimpleNamespace(forward=lambda *_: ALLOCATIONS[name]())
    parked: Any = None
    with pytest.raises(torch.OutOfMemoryError):
        Rank(engine, parked, Stationary()).forward(Batch((), (), (), (), ()))


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError) as raised, naming_lack_of_memory():
        torch.ones(2) @ torch.ones(3)
    assert not isinstance(raised.value, torch.OutOfMemoryError)
