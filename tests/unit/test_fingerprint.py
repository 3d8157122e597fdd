"""The fingerprint of a model: every byte counts, and nothing but the files does."""

import json
import os
from pathlib import Path

import pytest

from models import fingerprint
from models.fingerprint import StampedFiles
from protocol.errors import ConfigError


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "_READ_BYTES", 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 2500)
    return tmp_path


def test_every_byte_counts(folder: Path) -> None:
    seen = {StampedFiles(folder).fingerprint()}
    for name in ("config.json", "a.safetensors", "b.safetensors"):
        whole = bytearray((folder / name).read_bytes())
        for place in {0, 299, 300, 999, 1000, 1777, 2499} & set(range(len(whole))):
            whole[place] ^= 1
            (folder / name).write_bytes(whole)
            seen.add(StampedFiles(folder).fingerprint())
    assert len(seen) == 1 + 1 + 7 + 7


def test_what_is_in_which_file_counts(folder: Path) -> None:
    before = StampedFiles(folder).fingerprint()
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    content = a.read_bytes(), b.read_bytes()
    a.write_bytes(content[1])
    b.write_bytes(content[0])
    assert StampedFiles(folder).fingerprint() != before
    a.write_bytes(content[0] + content[1][:1000])
    b.write_bytes(content[1][1000:])
    assert StampedFiles(folder).fingerprint() != before


def test_threads_and_copies_make_no_difference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
        os.utime(copy / file.name, (1, 1))
    (copy / "README.md").write_text("of no account")
    assert StampedFiles(copy).fingerprint(num_threads=3) == StampedFiles(folder).fingerprint(num_threads=1)


def test_only_the_weights_that_are_served_count_and_the_index_with_them(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    before = StampedFiles(folder).fingerprint()
    (folder / "b.safetensors").write_bytes(b"not read")
    assert StampedFiles(folder).fingerprint() == before
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}))
    assert StampedFiles(folder).fingerprint() != before


def test_files_that_change_while_a_model_loads_are_noticed(folder: Path) -> None:
    taken = StampedFiles(folder)
    taken.fingerprint()
    taken.check_unchanged()
    other = folder / "new"
    other.write_bytes((folder / "a.safetensors").read_bytes())
    other.replace(folder / "a.safetensors")
    with pytest.raises(ConfigError, match=r"a\.safetensors changed while this model was loaded"):
        taken.check_unchanged()
    (folder / "a.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"a\.safetensors cannot be read: No such file"):
        taken.check_unchanged()


def test_what_is_done_is_told(folder: Path) -> None:
    told: list[str] = []
    StampedFiles(folder).fingerprint(progress=told.append)
    assert told == ["reading 0.0 GB of weights: 0%"]
