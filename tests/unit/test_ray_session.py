"""Leaving a Ray cluster, with Ray played by a function that takes its time; and who may read its token."""

import subprocess
import sys
from pathlib import Path

from cluster import ray_session

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


def test_nobody_else_reads_rays_token_whether_it_is_there_or_yet_to_be_drawn(tmp_path: Path):
    """Of either the folder or the file: what Ray draws later is as open as the user's umask says."""
    ray_session.close_token(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    token = tmp_path / "auth_token"
    token.touch(mode=0o644)
    ray_session.close_token(tmp_path)
    assert token.stat().st_mode & 0o077 == 0
