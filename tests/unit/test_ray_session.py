"""Leaving a Ray cluster, with Ray played by a function that takes its time."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

STUCK = """
import atexit, sys, time
from cluster import ray_session
def shutdown():
    time.sleep(300)
atexit.register(shutdown)
ray_session._leave(shutdown, 0.1)
sys.exit(7)
"""


def test_a_cluster_whose_machine_was_cut_off_is_left_all_the_same_and_the_exit_code_stays():
    assert subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, timeout=60, check=False).returncode == 7
