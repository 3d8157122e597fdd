"""What is left of an `up` that was killed ends, and nothing else does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.processes import wait_for

ROOT = Path(__file__).parents[2]

KILLED = """
import os, signal, subprocess
from cluster.reaper import Reaper
stranger = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, start_new_session=True)
reaper = Reaper()
with reaper.marking():
    ours = subprocess.Popen(["sh", "-c", "sleep 61 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
print(stranger.pid, ours.pid, int(ours.stdout.readline()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_whoever_bears_the_mark_of_a_killed_driver_ends_and_a_stranger_does_not():
    output = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, check=False).stdout
    stranger, *ours = (int(pid) for pid in output.split())
    wait_for(lambda: not any(map(is_running, ours)), 10, "our processes end")
    assert is_running(stranger)
    os.kill(stranger, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False
