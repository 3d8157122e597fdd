"""A JSON file of a model folder, read value by value: each is of the kind that is asked for, or a ConfigError names it.

Used by the families. What a key means is theirs to know.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from protocol.errors import ConfigError

LARGEST = 2**31 - 1
LARGEST_FLOAT = 1e300


class ConfigFile:
    """One JSON object. place: what errors call it, the file's path and the keys that lead to the object."""

    def __init__(self, place: str, values: Mapping[str, Any]) -> None:
        self.place = place
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """Return whatever stands there; None when nothing does."""
        return self._values.get(key)

    def values(self) -> Iterable[Any]:
        """Return whatever stands in the file."""
        return self._values.values()

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """Return a number of things, from least to most; default where the file has none."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not _is_integer(value) or value < least:
            raise self.refusal(key, "must be a positive integer" if least else "must be an integer of 0 or more")
        if value > most:
            raise self.refusal(key, f"must be at most {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive, finite number; default where the file has none."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not (isinstance(value, float) or _is_integer(value)) or not 0 < value <= LARGEST_FLOAT:
            raise self.refusal(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false; default where the file has neither."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, "must be true or false")
        return default if value is None else value

    def text(self, key: str, default: str) -> str:
        """Return a string; default where the file has none."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, "must be a string")
        return default if value is None else value

    def section(self, key: str) -> "ConfigFile":
        """Return the object that stands there; an empty one where the file has none."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(key, "must be an object")
        return ConfigFile(f"{self.place}: {key}", value or {})

    def items(self, key: str) -> list[Any]:
        """Return the list that stands there; an empty one where the file has none."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.refusal(key, "must be a list")
        return value or []

    def refusal(self, key: str, complaint: str) -> ConfigError:
        """Return an error that names file, key and value."""
        return ConfigError(f"{self.place}: {key} {complaint}, not {reprlib.repr(self._values.get(key))}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def read_config_file(path: Path) -> ConfigFile:
    """Read a file that holds one JSON object. Raise ConfigError when it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; a model folder needs it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deep to be a model's") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object")
    return ConfigFile(str(path), content)
