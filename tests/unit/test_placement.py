"""The path by which workers find a model, on machines with a copy of the driver's folder and on those that share it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import placement
from cluster.placement import path_for_workers
from models.files import find_model


def run_under(patch: pytest.MonkeyPatch, **runtime_env: Any) -> None:
    context = SimpleNamespace(runtime_env=runtime_env)
    patch.setattr(placement, "ray", SimpleNamespace(get_runtime_context=lambda: context))


def folder_of(home: Path) -> Path:
    folder = home / "configs" / "a_model"
    folder.mkdir(parents=True)
    return folder


def test_a_model_in_a_shipped_working_directory_is_found_in_the_copy_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder_of(tmp_path / "head")
    copy = folder_of(tmp_path / "elsewhere" / "copy")
    run_under(monkeypatch, working_dir="gcs://_ray_pkg.zip")
    monkeypatch.chdir(tmp_path / "head")
    path = path_for_workers("configs/a_model")
    monkeypatch.chdir(tmp_path / "elsewhere" / "copy")
    assert find_model(path) == copy


def test_without_one_a_model_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(tmp_path)
    run_under(monkeypatch)
    monkeypatch.chdir(tmp_path)
    path = path_for_workers("configs/a_model")
    monkeypatch.chdir("/")
    assert find_model(path) == folder


@pytest.mark.parametrize("runtime_env", [{}, {"working_dir": "gcs://_ray_pkg.zip"}])
def test_an_absolute_path_and_a_hub_id_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime_env: dict[str, str]
):
    folder = folder_of(tmp_path)
    run_under(monkeypatch, **runtime_env)
    assert path_for_workers(str(folder)) == str(folder)
    assert path_for_workers("somebody/something") == "somebody/something"
