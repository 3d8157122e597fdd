"""Fetches a model from the Hugging Face hub, and tells meanwhile how much has come. Called by files.py.

The hub's client caches files, resumes what was cut off and gives up by itself when the hub stays silent.
"""

import threading
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from protocol.progress import Tell

TELL_EVERY_S = 10.0


def fetch(hub_id: str, patterns: tuple[str, ...], progress: Tell) -> Path:
    """Return the folder of those files of a model whose names match. Raise ConfigError when the hub does not give them.

    progress is called by this thread, every TELL_EVERY_S; the client has threads of its own.
    """
    download = _Download(hub_id, patterns)
    while not download.has_ended(TELL_EVERY_S):
        progress(f"fetching {hub_id} from the hub: {_shown(download.num_bytes)}")
    return download.folder()


class _Download:
    """One download on a thread of its own, which ends with the process if need be. num_bytes: that have come so far."""

    def __init__(self, hub_id: str, patterns: tuple[str, ...]) -> None:
        self._hub_id = hub_id
        self._patterns = list(patterns)
        self._folder: str | None = None
        self._error: Exception | None = None
        self.num_bytes = 0
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def has_ended(self, within_s: float) -> bool:
        """Wait for the end, at most that long."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def folder(self) -> Path:
        if self._folder is None:
            reason = f"is neither a folder nor a model the hub gave us: {self._error}"
            raise ConfigError(f"model.path {self._hub_id} {reason}") from self._error
        return Path(self._folder)

    def _run(self) -> None:
        from huggingface_hub import snapshot_download  # slow to import, and most starts do not need it

        try:
            self._folder = snapshot_download(self._hub_id, allow_patterns=self._patterns, tqdm_class=self._counter())
        except Exception as error:  # whatever the hub's client raises, the user needs one sentence
            self._error = error

    def _counter(self) -> Any:
        """Return a class of progress bars that leave their bytes here; without a terminal none of them is drawn."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        download = self

        class Counter(tqdm):
            def __init__(self, *args: object, unit: str = "it", **kwargs: object) -> None:
                self._num_bytes: float | None = 0 if unit == "B" else None  # other bars count files
                super().__init__(*args, unit=unit, **kwargs)  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> bool | None:
                if self._num_bytes is not None:
                    self._num_bytes += n or 0
                    download.num_bytes = max(download.num_bytes, int(self._num_bytes))
                drawn: bool | None = super().update(n)
                return drawn

        return Counter


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
