"""Where a model's files are, and which of them are its weights. Never torch.

model.path in a topology is a folder or a hub id.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from models.hub import fetch
from protocol.errors import ConfigError
from protocol.progress import Tell, say_nothing

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model")
WEIGHT_FILES = ("*.safetensors",)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class WeightFiles(msgspec.Struct, frozen=True):
    """A model's weights. index: the file that says in which of paths a tensor is, and places: what it says."""

    folder: Path
    paths: tuple[Path, ...]
    index: Path | None = None
    places: Mapping[str, Path] = {}


def find_model(
    path: str, patterns: tuple[str, ...] = TOKENIZER_FILES + WEIGHT_FILES, progress: Tell = say_nothing
) -> Path:
    """Return the folder of a model, fetching it from the hub when path is not a folder. Raise ConfigError otherwise."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"model.path {path}: no such folder")
    return fetch(path, patterns, progress)


def find_weights(folder: Path) -> WeightFiles:
    """Return the files that the index names; without one model.safetensors, or else every safetensors file.

    Raise ConfigError when there are none, or when a second set of weights lies beside those that the index names.
    """
    if (folder / INDEX).exists():
        indexed = _indexed(folder)
        if indexed is not None:
            return indexed
    paths = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{folder} holds no *.safetensors; a model folder needs its weights in that format")
    return WeightFiles(folder, tuple(paths))


def _indexed(folder: Path) -> WeightFiles | None:
    """Return what the index names; None when all of that is gone and model.safetensors has taken its place."""
    names = _weight_map(folder / INDEX)
    paths = sorted({folder / name for name in names.values()})
    missing = [path for path in paths if not path.is_file()]
    if folder / SINGLE not in paths and (folder / SINGLE).exists():
        if len(missing) == len(paths):
            return None
        raise ConfigError(
            f"{folder} holds {SINGLE} and other weights that {INDEX} names ({paths[0].name}, ...); delete those that "
            f"are not meant to be served"
        )
    if missing:
        raise ConfigError(f"{missing[0]} is missing; {INDEX} names it")
    return WeightFiles(folder, tuple(paths), folder / INDEX, {name: folder / file for name, file in names.items()})


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> name of its file."""
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        names = msgspec.convert(content["weight_map"], dict[str, str])
        if names and all(Path(name).name == name for name in names.values()):
            return names
    except (OSError, ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError):
        pass
    raise ConfigError(f"{index} is not an index of safetensors files: it must hold an object weight_map of file names")
