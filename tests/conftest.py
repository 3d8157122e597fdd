"""What all tests share: GPU tests skip themselves where there is no GPU, and which model end-to-end tests serve.

Nothing here is timed: hypothesis has no deadline, and torch computes on one thread, because threads that outnumber the
cores wait for one another.
"""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
hypothesis.settings.register_profile("tandem", deadline=None)
hypothesis.settings.load_profile("tandem")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", default="configs/demo_model", help="the model folder that end-to-end tests serve")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    for item in items:
        if item.get_closest_marker("gpu"):
            # What drivers and torch's CUDA build warn of is no mistake of ours, and not known everywhere.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
