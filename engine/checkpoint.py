"""A model's safetensors files, checked against the tensors that its configuration calls for, read slice by slice.

Used by the weights. Every name, shape and type is checked from the files' headers before the first byte is read, so a
wrong checkpoint is refused within a moment. Knows nothing of layers.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.tensor_parallel import Range
from protocol.errors import ConfigError

Shape = tuple[int, ...]
READABLE_TYPES = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """The tensors of one model folder, converted to dtype and moved to device as they are read."""

    def __init__(
        self,
        folder: Path,
        expected: Mapping[str, Shape],
        is_ignored: Callable[[str], bool],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Open the files. Raise ConfigError naming the first tensor that is missing, extra, misshapen or quantized."""
        self._dtype = dtype
        self._device = device
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    raise ConfigError(f"{path}: tensor {name} is in another file of {folder} too")
                self._files[name] = file
        self._check_names(folder, expected, is_ignored)
        for name, shape in expected.items():
            self._check_tensor(folder, name, shape)

    def whole(self, name: str) -> Tensor:
        return self._to_place(self._files[name].get_tensor(name))

    def rows(self, name: str, rows: Range) -> Tensor:
        """Return rows of a matrix, or elements of a vector."""
        return self._to_place(self._files[name].get_slice(name)[rows.start : rows.stop])

    def columns(self, name: str, columns: Range) -> Tensor:
        return self._to_place(self._files[name].get_slice(name)[:, columns.start : columns.stop])

    def _to_place(self, tensor: Tensor) -> Tensor:
        """Copy: what safetensors hands out is a view of the mapped file, as wide as the whole tensor."""
        return tensor.to(self._device, self._dtype, copy=True, memory_format=torch.contiguous_format)

    def _check_names(self, folder: Path, expected: Mapping[str, Shape], is_ignored: Callable[[str], bool]) -> None:
        for name in expected:
            if name not in self._files:
                raise ConfigError(f"{folder}: tensor {name} of shape {expected[name]} is missing from the weights")
        for name in self._files:
            if name not in expected and not is_ignored(name):
                raise ConfigError(f"{folder}: the weights hold tensor {name}, which config.json has no place for")

    def _check_tensor(self, folder: Path, name: str, expected: Shape) -> None:
        header = self._files[name].get_slice(name)
        shape = tuple(header.get_shape())
        if shape != expected:
            raise ConfigError(f"{folder}: tensor {name} has shape {shape}; config.json calls for {expected}")
        if header.get_dtype() not in READABLE_TYPES:
            raise ConfigError(
                f"{folder}: tensor {name} is of type {header.get_dtype()}; served are {', '.join(READABLE_TYPES)}"
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that the index names; without one model.safetensors, or else every safetensors file."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        return _indexed_files(index)
    paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{folder} holds no *.safetensors file")
    return paths


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index} is not an index of safetensors files: it must hold an object weight_map") from None
    for name in names:
        if not (index.parent / name).is_file():
            raise ConfigError(f"{index.parent / name} is missing; {index.name} names it")
    return [index.parent / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error
