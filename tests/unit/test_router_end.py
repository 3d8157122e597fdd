"""A router whose driver was killed, and that cannot end in good order, ends all the same."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

STUCK = """
import asyncio, time
from router.process import _watch_ends
async def serve():
    _watch_ends(0, within_s=0.2)
    time.sleep(60)  # a loop that never comes round
asyncio.run(serve())
"""


def test_a_router_that_hangs_does_not_outlive_its_driver_for_long():
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert done.returncode == 1
