"""Operations of NCCL end in time: finished, failed, or aborted; and how its groups are opened."""

import os
import time

import pytest
import torch

from kernels import process_group
from kv_transfer.transports.torch.communicator import finish


class FakeWork:
    """An operation that is over after so many questions, if ever."""

    def __init__(self, num_questions: int | None, error: Exception | None = None) -> None:
        self._left = num_questions
        self._error = error

    def is_completed(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0

    def exception(self) -> Exception | None:
        return self._error


def test_an_operation_that_ends_is_not_aborted():
    aborted: list[bool] = []
    finish(FakeWork(5), 5.0, lambda: aborted.append(True))
    assert aborted == []


def test_an_operation_that_does_not_end_is_aborted_in_time():
    aborted: list[float] = []
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the other end did nothing for 0.2 s"):
        finish(FakeWork(None), 0.2, lambda: aborted.append(time.monotonic()))
    assert len(aborted) == 1
    assert 0.2 <= aborted[0] - began < 1


def test_an_operation_that_failed_is_aborted_and_says_why():
    aborted: list[bool] = []
    with pytest.raises(RuntimeError, match="remote process exited"):
        finish(FakeWork(0, RuntimeError("remote process exited")), 5.0, lambda: aborted.append(True))
    assert aborted == [True]


@pytest.mark.parametrize("before", [None, "1"])
def test_a_fragile_group_is_opened_unwatched_and_the_environment_is_left_as_it_was(before, monkeypatch):
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    seen: list[dict[str, str]] = []

    def fail(*_):
        seen.append({name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL_")})
        raise RuntimeError("no GPU")

    monkeypatch.setattr(process_group, "_nccl", fail)
    with pytest.raises(RuntimeError, match="no GPU"):
        process_group.open_fragile_group(None, 0, 2, torch.device("cuda", 0))
    assert seen[0].items() >= process_group._UNWATCHED.items()
    assert os.environ.get(name) == before
    assert "TORCH_NCCL_ENABLE_MONITORING" not in os.environ
