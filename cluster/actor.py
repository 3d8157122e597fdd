"""The one Ray actor class: a process that is one rank of one group, for one life.

Created by cluster/placement.py, which names it, gives it its share of the machine and calls run once. Ray restarts the
process when it dies and calls run again with the same launch; it carries no request and no token.
"""

import msgspec

from cluster import launch


class WorkerActor:
    """Holds no state: everything a life needs is in the launch, everything it learns dies with it."""

    def run(self, encoded: bytes) -> None:
        """Be the worker that encoded describes, until the router says Stop.

        Raises ConfigError for a model that cannot be served; a fenced life ends by os._exit, so Ray starts the next.
        """
        from cluster.worker import run_worker  # torch comes with it, and only workers pay for that

        mine = launch.decode(encoded)
        run_worker(mine if mine.host else msgspec.structs.replace(mine, host=_address_of_this_node()))


def _address_of_this_node() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
