"""Calls that may not come back, such as Ray's when part of it is gone, and that must not keep the driver."""

import threading
from collections.abc import Callable


def run_within(seconds: float, work: Callable[[], None]) -> bool:
    """Do work on a thread of its own; return whether it was done in time. What it raises is printed there."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
