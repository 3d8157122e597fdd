"""The engine's benchmark, run as `make bench-engine` does, on whatever is here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import host_speed
from benchmarks.device_timer import Ceiling, ceiling
from benchmarks.engine import Report, measure_engine, measure_kernels
from benchmarks.engine_plan import FULL, H200_PEERS, SMOKE, Plan
from benchmarks.engine_speed import Work
from benchmarks.step_profile import KINDS
from tests.pretend_cuda.device import pretended
from tests.pretend_cuda.operations import use_kernels

ROOT = Path(__file__).parents[2]


def expected_rows(plan: Plan) -> set[str]:
    kernels = ("add + RMSNorm", "RoPE + KV write", "SiLU x mul", "gather of KV blocks", "scatter of KV blocks")
    return {
        *(f"prefill {work}" for work in plan.prefills),
        *(f"decode step {work}" for work in plan.decodes),
        *(f"decode attention {work}" for work in plan.decode_attention),
        *(f"prefill attention {chunks}" for chunks in plan.prefill_attention),
        *(
            f"prefill attention {chunks}, {by}"
            for chunks in plan.prefill_attention
            if chunks.query_len == chunks.context_len
            for by in ("library", "library, new length")
        ),
        *(f"{kernel}, {num} tokens" for kernel in kernels for num in plan.num_tokens),
    }


def test_every_peer_has_a_row_to_stand_beside() -> None:
    assert H200_PEERS.keys() <= expected_rows(FULL)
    ours = {name for name in expected_rows(FULL) if "library" not in name}
    engine_rows = {name for name in ours if name.startswith(("prefill", "decode"))}
    assert engine_rows == H200_PEERS.keys()


def test_it_runs_and_every_figure_is_a_positive_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = tmp_path / "engine.json"
    command = [sys.executable, "-m", "benchmarks.engine", "--json", str(file)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    report = json.loads(file.read_text())
    assert report["environment"].keys() == {"commit", "torch", "device"}
    assert all(math.isfinite(figure) and figure > 0 for figure in report["ceiling"].values())
    assert {row["name"] for row in report["rows"]} == expected_rows(SMOKE)
    for row in report["rows"]:
        assert row["name"] in shown
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("seconds", "floor_seconds", "of_floor")), row
        assert row["of_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["peer_seconds"] is None, "peers were measured on another machine"
    assert report["problems"] == []


def test_a_row_that_fails_is_told_and_costs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({"device": "none"}, Ceiling(1e9, 1e12), tmp_path / "engine.json")
    for name in ("one", "two"):
        with report.guarded(name):
            if name == "one":
                raise RuntimeError("no kernel for this shape\nand much more")
            report.add(name, 1.0, "fast", 0.5)
    assert report.has_problems
    kept = json.loads((tmp_path / "engine.json").read_text())
    assert kept["problems"] == [{"name": "one", "problem": "no kernel for this shape"}]
    assert [row["name"] for row in kept["rows"]] == ["two"]
    assert "failed: no kernel for this shape" in capsys.readouterr().out


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build asks its driver how attention is done best")
def test_what_it_measures_on_a_gpu_can_be_captured_and_launched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pretended(monkeypatch, total_bytes=1 << 30) as cuda:
        use_kernels(monkeypatch, cuda)
        device = torch.device("cuda")
        best = ceiling(device, SMOKE.dtype, SMOKE.copy_elements, SMOKE.matrix)
        report = Report({"device": "pretended"}, best, None)
        measure_kernels(SMOKE, device, best, report)
        measure_engine(SMOKE, device, best, report)
    assert not report.has_problems
    shown = capsys.readouterr().out
    assert all(name in shown for name in expected_rows(SMOKE))


def test_the_profile_of_a_step_names_what_it_launches_and_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CC", "no-such-compiler")  # torch's profiler sees torch's operations only
    file = tmp_path / "profile.json"
    command = [sys.executable, "-m", "benchmarks.step_profile", "--json", str(file)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    report = json.loads(file.read_text())
    total = sum(kernel["microseconds"] for kernel in report["kernels"])
    assert f"{total:10.1f}{1:8.1%}          all kernels" in shown
    products = [kernel for kernel in report["kernels"] if any(mark in kernel["name"] for mark in KINDS["products"])]
    assert sum(kernel["num_calls"] for kernel in products) == 4 * SMOKE.sizes.num_layers + 1, (
        "every product once a step"
    )
    assert all(floor > 0 for floor in report["floors_us"].values())


def test_the_hosts_part_of_a_step_is_measured_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_speed, "NUM_STEPS", 5)
    assert 0 < host_speed.step_s(Work(3, 40)) < 1
