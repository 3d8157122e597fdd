"""A model's safetensors files, checked against the tensors that its description calls for, read slice by slice.

Used while a decoder is built. Every name, shape and type is checked from the files' headers before the first byte is
read, so a wrong checkpoint is refused within a moment. Which files count is files.py's to say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.files import WeightFiles, find_weights
from models.spec import DecoderSpec, Shape
from models.tensor_parallel import Range
from models.vocabulary import vocabulary_tensors
from protocol.errors import ConfigError

READABLE_TYPES = ("F64", "F32", "F16", "BF16")


def open_checkpoint(folder: Path, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> "Checkpoint":
    """Open the weights in folder. Raise ConfigError naming the first tensor that spec and files do not agree about."""
    checkpoint = Checkpoint(find_weights(folder), dtype, device)
    checkpoint.check(spec.tensors() | vocabulary_tensors(spec.vocabulary, checkpoint))
    return checkpoint


class Checkpoint:
    """The tensors of one model folder, converted to dtype and moved to device as they are read."""

    def __init__(self, files: WeightFiles, dtype: torch.dtype, device: torch.device) -> None:
        """Open the files. Raise ConfigError when one cannot be read, or when it is open which file a tensor is in."""
        self._folder = files.folder
        self._dtype = dtype
        self._device = device
        opened = {path: _open(path) for path in files.paths}
        places = _places(files, {path: set(file.keys()) for path, file in opened.items()})
        self._files = {name: opened[path] for name, path in places.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Raise ConfigError naming the first tensor that is missing, extra, misshapen or quantized."""
        for name, shape in expected.items():
            if name not in self._files:
                raise ConfigError(f"{self._folder}: tensor {name} of shape {shape} is missing from the weights")
        for name in self._files:
            if name not in expected and not name.endswith("rotary_emb.inv_freq"):  # which old checkpoints hold
                raise ConfigError(f"{self._folder}: the weights hold tensor {name}, which config.json has no place for")
        for name, shape in expected.items():
            self._check_tensor(name, shape)

    def _check_tensor(self, name: str, expected: Shape) -> None:
        header = self._files[name].get_slice(name)
        shape = tuple(header.get_shape())
        if shape != expected:
            raise ConfigError(f"{self._folder}: tensor {name} has shape {shape}; config.json calls for {expected}")
        if header.get_dtype() not in READABLE_TYPES:
            raise ConfigError(
                f"{self._folder}: tensor {name} is of type {header.get_dtype()}; served are {', '.join(READABLE_TYPES)}"
            )

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


def _places(files: WeightFiles, held: Mapping[Path, set[str]]) -> dict[str, Path]:
    """Return the file of each tensor: the one that the index says, or else the only one that holds it."""
    places: dict[str, Path] = {}
    for path, names in held.items():
        for name in names - files.places.keys():
            if name in places:
                raise ConfigError(f"{path}: tensor {name} is in another file of {files.folder} too")
            places[name] = path
    for name, path in files.places.items():
        if name not in held[path]:
            raise ConfigError(f"{path} holds no tensor {name}, though the index says so")
    return places | dict(files.places)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error
