"""Sizes as people write them in a topology: "512MiB", "20GiB", "1.5GiB", or "90%" of what a GPU has free.

Used where a topology is read and where its limits are checked. Binary units only, so that nobody has to guess.
"""

import re

from protocol.errors import ConfigError

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_MOST = 1 << 60
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[A-Za-z]*)")


def parse_memory(text: str) -> int:
    """Return the number of bytes in text; raise ConfigError saying how to write it."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"] not in _UNITS:
        raise ConfigError(f'"{text}" is not a memory size; write it as 512MiB or 20GiB (units: {", ".join(_UNITS)})')
    num_bytes = float(match["number"]) * _UNITS[match["unit"]]
    if num_bytes > _MOST:
        raise ConfigError(f'"{text}" is more memory than any machine has')
    return int(num_bytes)


def parse_share(text: str) -> float | None:
    """Return the share of free memory that text asks for, above 0 and at most 1, or None when it is a size.

    Raise ConfigError for a share that cannot be.
    """
    number, is_share, rest = text.strip().partition("%")
    if not is_share or rest:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?", number) or not 0 < float(number) <= 100:
        raise ConfigError(f'"{text}" is not a share of memory; write it as 90% (more than 0, at most 100)')
    return float(number) / 100


def format_memory(num_bytes: int) -> str:
    """Return num_bytes rounded up to a size that parse_memory reads."""
    unit = next((name for name in ("GiB", "MiB", "KiB") if num_bytes >= 10 * _UNITS[name]), "B")
    return f"{-(-num_bytes // _UNITS[unit])}{unit}"
