"""The one Ray actor class: a process that is one rank of one group, for one life.

Created by cluster/placement.py, which names it, gives it its share of the machine and calls run once. Ray restarts the
process when it dies and calls run again with the same launch; it carries no request and no token.
"""

import gc
import os
import sys

import msgspec

from protocol.errors import ConfigError, TandemError
from worker import launch

_LOOKS_BEFORE_SLEEP = "5000"
"""How often an idle thread of OpenMP's looks for work, some hundred microseconds in all; by default it is milliseconds,
on a core that a router, a client or another worker may need."""


class WorkerActor:
    """Holds no state: everything a life needs is in the launch, everything it learns dies with it."""

    def run(self, encoded: bytes) -> None:
        """Be the worker that encoded describes, until the router says Stop.

        Raises ConfigError for a model that cannot be served. A life that must end at once (fenced, its group is lost, a
        signal asks for it, or it hangs) takes the whole process with it, so that Ray starts the next one from nothing.
        """
        os.environ.setdefault("GOMP_SPINCOUNT", _LOOKS_BEFORE_SLEEP)  # read once, when torch comes
        from worker.dead_man_switch import DeadManSwitch, end_this_process
        from worker.departure import Departure
        from worker.life import run_worker  # torch comes with it, and only workers pay for that

        gc.freeze()  # what came with torch stays; to look at all of it in mid-stream takes 40 ms and more
        mine = launch.decode(encoded)
        departure = Departure()
        try:
            with departure.listening():
                run_worker(_with_host(mine), DeadManSwitch(end_this_process), departure)
        except ConfigError:
            raise
        except TandemError as error:
            print(f"{mine.name}: {error}; this life ends", file=sys.stderr, flush=True)
            os._exit(1)


def _with_host(mine: launch.WorkerLaunch) -> launch.WorkerLaunch:
    """Fill in the address of this node where the driver does not know it."""
    if mine.host:
        return mine
    import ray

    return msgspec.structs.replace(mine, host=str(ray.util.get_node_ip_address()))
