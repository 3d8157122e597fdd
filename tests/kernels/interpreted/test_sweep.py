"""The sweep over configurations, with kernels interpreted and nothing timed: what it tries is what launches find."""

from dataclasses import replace

import pytest
import torch

from benchmarks import kernel_speed
from benchmarks.engine_plan import SMOKE
from benchmarks.kernel_sweep import TRIALS, Sweep, told
from kernels.triton import silu_mul

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each row wanted timed; the first is made, and each row takes a second less than the one before."""
    made: list[int] = []

    def once(calls: list[kernel_speed.Call], device: torch.device) -> float:
        calls[0]()
        made.append(len(calls))
        return 100.0 - len(made)

    monkeypatch.setattr(kernel_speed, "seconds", once)
    return made


@pytest.mark.parametrize("name", TRIALS)
def test_every_entry_can_be_tried(name: str, calls: list[int]) -> None:
    sweep = Sweep(SMOKE, CPU)
    entry = sweep.entry(name)
    assert entry.candidates[0] == entry.declared
    assert len(set(entry.candidates)) == len(entry.candidates) > 4
    results = [sweep.timed(entry, candidate) for candidate in entry.candidates[:2]]
    assert [result.candidate for result in results] == entry.candidates[:2]
    assert all(len(result.seconds) == len(entry.rows) for result in results)
    _, heading, declared, other = "\n".join(told(name, ["a row"], results)).split("\n")
    assert heading == f"{name}: times in us for a row"
    assert declared.startswith("  1.000  the table's")
    assert float(other.split()[0]) < 1, "later rows took less"


def test_launches_find_the_candidate_and_afterwards_the_table_again(calls: list[int]) -> None:
    entry = Sweep(SMOKE, CPU).entry("gate")
    candidate = replace(entry.declared, tile=16)
    with entry.replaced(candidate):
        assert candidate == silu_mul.SILU_MUL
    assert entry.declared == silu_mul.SILU_MUL


def test_what_cannot_be_launched_is_told_with_its_reason(calls: list[int]) -> None:
    sweep = Sweep(SMOKE, CPU)
    entry = sweep.entry("gate")
    odd = replace(entry.declared, tile=48)
    results = list(sweep.results("gate", [entry.declared, odd]))
    assert [bool(result.problem) for result in results] == [False, True]
    assert "power of 2" in results[1].problem
    assert list(told("gate", [], results))[-1] == f"   none  {'tile 48':48}{results[1].problem}"


def test_when_time_is_up_nothing_more_is_tried(calls: list[int]) -> None:
    assert list(Sweep(SMOKE, CPU, until=0.0).results("gate", [1, 2])) == []
    assert not calls
