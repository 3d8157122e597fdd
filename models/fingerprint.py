"""A fingerprint that tells two models apart: of every byte of config.json and of the weights.

Taken by every rank when it starts, of the files that it loads from, whatever share of them is its own: prefill and
decode compare fingerprints before they pair, also when their ranks have different shares. Files are read in order, in
large pieces, by several threads, so that the loader after it finds them in the page cache.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import xxhash

from models.files import find_weights
from protocol.errors import ConfigError
from protocol.progress import Tell, say_nothing

PIECE_BYTES = 64 << 20
"""What one digest of a file is of. Changing it changes every fingerprint."""
_READ_BYTES = 1 << 20
_TELL_EVERY = 16


class _Stamp(NamedTuple):
    """What is another value when a file was written or replaced."""

    inode: int
    size: int
    mtime_ns: int


class StampedFiles:
    """The files of one model as they are now. Made before any of them is opened, asked after all have been read."""

    def __init__(self, folder: Path) -> None:
        """Raise ConfigError when the folder holds no weights, or a file cannot be read."""
        weights = find_weights(folder)
        index = [] if weights.index is None else [weights.index]
        self._stamps = {path: _stamp(path) for path in (folder / "config.json", *index, *weights.paths)}

    def fingerprint(self, num_threads: int = 1, progress: Tell = say_nothing) -> str:
        """Read every byte; return 32 hexadecimal digits. Raise ConfigError when a file cannot be read."""
        sizes = {path: stamp.size for path, stamp in self._stamps.items()}
        try:
            return _digest(sizes, num_threads, progress)
        except OSError as error:
            raise ConfigError(f"the model's files cannot be read: {error}") from error

    def check_unchanged(self) -> None:
        """Raise ConfigError when a file is another one than it was, so that what was loaded since may be as well."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise ConfigError(f"{path} changed while this model was loaded from it; start again")


def _stamp(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return _Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _digest(sizes: Mapping[Path, int], num_threads: int, progress: Tell) -> str:
    """Return the digest of names, sizes and the digests of all pieces in order."""
    whole = hashlib.sha256("".join(f"{path.name} {size}\n" for path, size in sizes.items()).encode())
    pieces = [(path, start) for path, size in sizes.items() for start in range(0, size, PIECE_BYTES)]
    threads = ThreadPoolExecutor(num_threads)
    try:
        for number, digest in enumerate(threads.map(_piece_digest, pieces)):
            if number % _TELL_EVERY == 0:
                progress(f"reading {sum(sizes.values()) / 1e9:.1f} GB of weights: {100 * number // len(pieces)}%")
            whole.update(digest)
    finally:
        threads.shutdown(cancel_futures=True)
    return whole.hexdigest()[:32]


def _piece_digest(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = PIECE_BYTES
        while left and (got := file.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:got])
            left -= got
    return digest.digest()
