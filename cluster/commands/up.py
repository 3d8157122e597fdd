"""`tandem up CONFIG`: start a cluster, serve until told to stop, leave nothing behind."""

import argparse
import json
from typing import Any

from cluster import ray_session
from cluster.checks import longest_context, roles
from cluster.commands.check import add_topology_arguments, describe, load_and_check, remarks
from cluster.progress import ProgressDisplay
from cluster.ray_session import RaySession
from cluster.router_process import RouterProcess
from cluster.stop_signal import StopSignal
from models.facts import ModelFacts
from models.files import TOKENIZER_FILES, find_model
from protocol.generation_config import load_sampling_defaults
from protocol.secret import Secret, new_secret
from protocol.topology import Topology
from router.launch import GroupSpec, RouterLaunch


def add(commands: Any) -> None:
    """Describe the command to argparse."""
    parser = commands.add_parser("up", help="start a cluster and serve until SIGINT or SIGTERM")
    add_topology_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop. ConfigError: it cannot work; TandemError: it failed while running."""
    topology, model = load_and_check(arguments)
    progress = ProgressDisplay(sum(section.groups * section.tensor_parallel for _, section in roles(topology)))
    for line in (f"starting {describe(topology)}", *remarks(topology, model)):
        progress.say(line)
    stop = StopSignal()
    with ray_session.connected(topology) as session:
        stop.listen()
        if not stop.is_asked:
            _serve(topology, model, session, progress, stop)
    progress.say("stopped")
    return 0


def _serve(
    topology: Topology, model: ModelFacts, session: RaySession, progress: ProgressDisplay, stop: StopSignal
) -> None:
    from cluster.placement import start_ranks  # these two import Ray, which takes a second and reads its settings then
    from cluster.supervisor import RayLost, Supervisor

    secret = new_secret()
    router = RouterProcess(_router_launch(topology, model, session.host, secret))
    try:
        host = session.host if session.is_local else ""
        ranks = start_ranks(topology, longest_context(topology, model), router.addresses.control, secret, host)
        supervisor = Supervisor(router, ranks, progress, session.logs, session.lost_part)
        try:
            status = supervisor.wait_until_ready(stop)
            if status is not None:
                progress.tell_capacity(status, longest_context(topology, model))
                if defaults := _sampling_defaults(topology):
                    progress.say(f"unless a request says otherwise: {defaults} (the model's generation_config.json)")
                progress.say(_invitation(router.addresses.http, _model_name(topology), session.logs))
                supervisor.watch(stop)
                progress.say("stopping")
                supervisor.drain(topology.router.grace_s)
        except RayLost as error:
            progress.say(f"{error}, once what runs has finished")
            supervisor.drain_router(topology.router.grace_s)
            raise
        finally:
            supervisor.kill()
    finally:
        router.end()


def _router_launch(topology: Topology, model: ModelFacts, control_host: str, secret: Secret) -> RouterLaunch:
    groups = (
        GroupSpec(role, group, section.tensor_parallel)
        for role, section in roles(topology)
        for group in range(section.groups)
    )
    return RouterLaunch(
        section=topology.router,
        control_host=control_host,
        model_folder=str(find_model(topology.model.path, TOKENIZER_FILES)),
        model_name=_model_name(topology),
        max_context=longest_context(topology, model),
        vocab_size=model.vocab_size,
        groups=tuple(groups),
        is_fetching=topology.decode is not None and topology.kv_transfer.min_fetch_tokens > 0,
        secret=secret,
    )


def _sampling_defaults(topology: Topology) -> str:
    """Return what requests get that say nothing, where that is not the model as it is."""
    is_wanted = topology.router.sampling_defaults == "model"
    return str(load_sampling_defaults(find_model(topology.model.path, TOKENIZER_FILES))) if is_wanted else ""


def _model_name(topology: Topology) -> str:
    return topology.model.name or topology.model.path


def _invitation(url: str, model_name: str, logs: str) -> str:
    body = json.dumps({"model": model_name, "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0})
    example = f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
    return f"ready: {url}\n  {example}\n  logs: {logs}"
