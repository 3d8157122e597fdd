"""Ray, connected or started for the length of one `up`.

Uses the cluster that RAY_ADDRESS names (a Ray job has it set), or else starts one of this machine alone. Ray is
imported here and in cluster/placement.py only, after the checks, for it takes a second.
"""

import atexit
import logging
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.checks import check_resources, num_local_cpus, num_local_gpus
from cluster.deadline import run_within
from cluster.reaper import Reaper
from protocol.errors import ConfigError
from protocol.topology import Topology

_OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: nothing of ours passes through it

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns about a default that it will change
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker died or was killed|retries remaining",  # we say so ourselves, in one line
}
"""Settings of Ray, read when it is imported; what the user has set stays."""

_SETTINGS_TO_JOIN = {"RAY_NUM_REDIS_GET_RETRIES": "2"}
"""Each takes 40 s when nobody answers, and no signal is heard meanwhile; by default it is a quarter of an hour."""

_SETTINGS_TO_START = {"RAY_kill_worker_timeout_milliseconds": "500"}
"""After so long a worker that is told to end is killed; one that was stopped hears nothing, and its place is wanted."""

_LEAVE_WITHIN_S = 10.0
_END_WITHIN_S = 4.0  # a cluster of one machine ends within three, if at all; the reaper sees to the rest


_WITHOUT_THESE_NOTHING_GOES_ON = {"gcs_server": "head", "raylet": "agent on this machine (raylet)"}


@dataclass(frozen=True)
class RaySession:
    """host: the address that the router binds for workers. is_local: this machine alone, started by us."""

    host: str
    is_local: bool
    logs: str

    def lost_part(self) -> str | None:
        """Return which part of a Ray that we started has ended by itself; of another cluster Ray itself must tell."""
        if not self.is_local:
            return None
        from ray._private.worker import global_worker  # who knows the processes has no public name

        ended = [kind for kind, _ in global_worker.node.dead_processes()]
        return next((name for kind, name in _WITHOUT_THESE_NOTHING_GOES_ON.items() if kind in ended), None)


def uses_existing_cluster() -> bool:
    """Whether there is a cluster to join."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


@contextmanager
def connected(topology: Topology) -> Iterator[RaySession]:
    """Join or start Ray, and leave it afterwards; a cluster that we started ends with that.

    Raise ConfigError when an existing cluster cannot be joined or has too little for the topology. Ray starts in a
    thread of its own: in the main thread it would take our signal handlers, and a signal would leave it half started.
    The thread stays, for Ray's processes die with the thread that started them. Whatever else is left of a cluster that
    we started is ended by a reaper.
    """
    for name, value in (_SETTINGS | (_SETTINGS_TO_JOIN if uses_existing_cluster() else _SETTINGS_TO_START)).items():
        os.environ.setdefault(name, value)
    reaper = None if uses_existing_cluster() else Reaper()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray") as ray_thread:
        import ray

        try:
            with reaper.marking() if reaper else nullcontext():
                session = ray_thread.submit(_start if reaper else _join, topology).result()
            yield session
        finally:
            _leave(ray.shutdown, _END_WITHIN_S if reaper else _LEAVE_WITHIN_S)
            if reaper:
                reaper.close()


def _join(topology: Topology) -> RaySession:
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError among them
        address = os.environ["RAY_ADDRESS"]
        raise ConfigError(f"RAY_ADDRESS is {address}, and no Ray cluster can be joined there: {error}") from None
    resources = ray.cluster_resources()
    check_resources(topology, resources.get("CPU", 0), resources.get("GPU", 0), where="the Ray cluster")
    return RaySession(str(ray.util.get_node_ip_address()), is_local=False, logs=_logs())


def _start(topology: Topology) -> RaySession:
    import ray

    close_token(Path.home() / ".ray")
    # A terminal that closes tells all processes that it started. Ray's are to live until what runs has finished.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    ray.init(
        address="local",
        num_cpus=num_local_cpus(),
        num_gpus=num_local_gpus(),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return RaySession("127.0.0.1", is_local=True, logs=_logs())


def close_token(folder: Path) -> None:
    """Let nobody else read the token that Ray keeps, or is about to draw, in this folder; by itself it lets all."""
    with suppress(OSError):  # where Ray can write nothing there is nothing to read
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "auth_token").chmod(0o600)


def _leave(shutdown: Callable[[], None], within_s: float) -> None:
    """Leave Ray; a cluster that we started ends with that.

    Ray waits minutes for answers of a machine that was cut off, and hears no signal. Once this process has ended, with
    nothing done at its exit, Ray finds that out by itself.
    """
    if not run_within(within_s, shutdown):
        atexit.unregister(shutdown)


def _logs() -> str:
    from ray._private.worker import global_worker  # the folder has no public name

    return str(global_worker.node.get_logs_dir_path())
