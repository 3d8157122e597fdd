"""Kernel tests run on one thread: on small tensors more threads only get in one another's way."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
