"""Which host a process is on, as far as shared memory goes. Used by the shm transport and by whoever chooses it."""

import os
from pathlib import Path


def host_identity() -> str:
    """Return a name that two processes share exactly if one can connect to the other's abstract Unix sockets.

    The kernel's boot id tells machines apart, the network namespace containers of one machine, and the user those whom
    the receiver would turn away. "" where the platform has none of this.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}-{os.stat('/proc/self/ns/net').st_ino}-{os.getuid()}"  # noqa: PTH116  (a Path would resolve the connection)
    except OSError:
        return ""
