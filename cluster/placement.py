"""A topology's ranks -> Ray actors: who runs with which share of which machine.

Called once by `up`. The ranks of a group are placed as one unit, on one node if they fit there. Ray's handles end here:
the rest of the command line sees a RankActor with a name and the future of its run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.state  # what Ray says of one actor has a public name only where its dashboard runs
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.checks import gpu_share, roles
from protocol.errors import TandemError
from protocol.memory_size import parse_memory, parse_share
from protocol.messages import RoleName
from protocol.secret import Secret
from protocol.topology import AnyRoleSection, Topology
from worker import launch
from worker.actor import WorkerActor
from worker.launch import CacheLaunch, ModelLaunch, WorkerLaunch

_PLACE_WITHIN_S = 120  # long enough for an autoscaler to bring a machine


@dataclass
class RankActor:
    """One actor, and the future of its current run."""

    launch: WorkerLaunch
    actor: Any
    running: Any

    @property
    def name(self) -> str:
        return self.launch.name

    def is_process(self, pid: int) -> bool:
        """Whether this life is still that process, as far as Ray knows."""
        actor = ray._private.state.actors(self.actor._actor_id.hex())
        return bool(actor.get("State") == "ALIVE" and actor.get("Pid") == pid)

    def kill(self) -> None:
        """Kill this life; Ray starts the next, and calls a run that has not ended again."""
        ray.kill(self.actor, no_restart=False)

    def run_again(self) -> None:
        """After a run has ended and its life was killed: what that one has left open is not known."""
        self.running = self.actor.run.options(name=self.name).remote(launch.encode(self.launch))

    def end(self) -> None:
        """Kill this life and have no other."""
        ray.kill(self.actor, no_restart=True)


def start_ranks(topology: Topology, max_context: int, control: str, secret: Secret, host: str) -> list[RankActor]:
    """Create the actors of every group. control is the router's address for them; host their own, "" to find it out."""
    ranks = []
    for role, section in roles(topology):
        for group in range(section.groups):
            launches = [
                _launch(topology, role, section, group, rank, max_context, control, secret, host)
                for rank in range(section.tensor_parallel)
            ]
            ranks += _start_group(launches, section.cpus, gpu_share(topology, section))
    return ranks


def _launch(
    topology: Topology,
    role: RoleName,
    section: AnyRoleSection,
    group: int,
    rank: int,
    max_context: int,
    control: str,
    secret: Secret,
    host: str,
) -> WorkerLaunch:
    cache, model = topology.cache_of(section), topology.model
    share = parse_share(cache.memory)
    return WorkerLaunch(
        role=role,
        group=group,
        rank=rank,
        model=ModelLaunch(path_for_workers(model.path), model.dtype, max_context),
        role_section=section,
        kv_cache=CacheLaunch(
            None if share else parse_memory(cache.memory), share or 0.0, cache.block_size, cache.prefix_caching
        ),
        kv_transfer=topology.kv_transfer,
        device=topology.device,
        control=control,
        secret=secret,
        host=host,
    )


def path_for_workers(path: str) -> str:
    """Return a model's folder as workers find it; a hub id stays as it is.

    Ray ships a job's working directory, and workers start in their machine's copy, wherever Ray keeps that. Without a
    working directory they may start in any folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    is_shipped = bool(ray.get_runtime_context().runtime_env.get("working_dir"))
    return f"./{folder}" if is_shipped and not folder.is_absolute() else str(folder.resolve())


def _start_group(launches: list[WorkerLaunch], cpus: float, gpus: float) -> list[RankActor]:
    bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    together = placement_group([bundle] * len(launches), strategy="PACK")
    if not together.wait(_PLACE_WITHIN_S):
        group = launches[0].name.rpartition("-")[0]
        raise TandemError(
            f"Ray found no place for {group} within {_PLACE_WITHIN_S} s: {len(launches)} ranks of {bundle}, "
            f"where {ray.available_resources()} is free"
        )
    return [_start_rank(each, cpus, gpus, together) for each in launches]


def _start_rank(mine: WorkerLaunch, cpus: float, gpus: float, together: Any) -> RankActor:
    place = PlacementGroupSchedulingStrategy(together, placement_group_bundle_index=mine.rank)
    actor = (
        ray.remote(WorkerActor)
        .options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=-1,  # a killed worker's run is called again on its next life
            scheduling_strategy=place,
        )
        .remote()
    )
    return RankActor(mine, actor, actor.run.options(name=mine.name).remote(launch.encode(mine)))


def lost_machines() -> list[str]:
    """Return the addresses of machines that Ray has given up and that have not come back."""
    machines = ray.nodes()
    here = {machine["NodeManagerAddress"] for machine in machines if machine["Alive"]}
    return sorted({machine["NodeManagerAddress"] for machine in machines} - here)
