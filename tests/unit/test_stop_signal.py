"""Which signals ask the driver to stop."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ASKED = """
import os, signal, sys
number = signal.Signals[sys.argv[1]]
if sys.argv[2] == "ignored":
    signal.signal(number, signal.SIG_IGN)
from cluster.stop_signal import StopSignal
stop = StopSignal()
os.kill(os.getpid(), number)
print(stop.is_asked)
"""


@pytest.mark.parametrize(
    ("name", "before", "is_asked"),
    [
        ("SIGINT", "heard", True),
        ("SIGTERM", "heard", True),
        ("SIGHUP", "heard", True),  # a terminal that is closed
        ("SIGHUP", "ignored", False),  # with nohup
    ],
)
def test_a_signal_asks_and_interrupts_nothing(name: str, before: str, is_asked: bool):
    command = [sys.executable, "-c", ASKED, name, before]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.strip() == str(is_asked).encode()
