"""What several files here need of a device that is pretended."""

import importlib
from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_chip() -> Iterator[None]:
    """Let what kernels remember of the device be that of this test."""
    pytest.importorskip("triton")
    configurations = importlib.import_module("kernels.triton.configurations")
    for remembered in (configurations.chip, configurations.num_multiprocessors):
        remembered.cache_clear()
    yield
    for remembered in (configurations.chip, configurations.num_multiprocessors):
        remembered.cache_clear()
