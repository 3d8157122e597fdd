"""Where a model's files are, and a fingerprint that tells two models apart.

model.path in a topology is a folder or a hub id. Prefill and decode compare fingerprints before they pair.
"""

import hashlib
from pathlib import Path

from protocol.errors import ConfigError
from protocol.hub import fetch
from protocol.progress import Tell, say_nothing

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model")
WEIGHT_FILES = ("*.safetensors",)


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


def model_hash(folder: Path) -> str:
    """Return a fingerprint of config.json and the weights: sizes, headers and evenly spaced samples of every file.

    Reading all of a large model would take minutes; a different training run differs in every sample.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        _update_from_samples(digest, path)
    return digest.hexdigest()[:32]


def _update_from_samples(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for index in range(_SAMPLES_PER_FILE):
            file.seek(size * index // _SAMPLES_PER_FILE)
            digest.update(file.read(_SAMPLE_BYTES))
