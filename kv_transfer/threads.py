"""How the threads of kv_transfer end: waited for, but never for ever. Used by whoever starts one."""

import logging
import threading
from collections.abc import Callable

CLOSE_S = 2.0

_log = logging.getLogger(__name__)


def start(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start a thread that holds up no process."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def has_ended(thread: threading.Thread, within_s: float = CLOSE_S) -> bool:
    """Wait for a thread to end; return False, and say so in the log, when it has not in time.

    It is a daemon: where a device or a library never returns to it, the process ends without it.
    """
    thread.join(within_s)
    if thread.is_alive():
        _log.warning("thread %s has not ended within %g s and is left behind", thread.name, within_s)
    return not thread.is_alive()
