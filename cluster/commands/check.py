"""`tandem check CONFIG`: whether a topology could start here, without starting anything."""

import argparse
from pathlib import Path
from typing import Any

from cluster.checks import MisfitError, check_this_machine, check_topology, roles
from cluster.ray_session import uses_existing_cluster
from cluster.topology_file import load_topology, place_of
from models.facts import ModelFacts
from models.files import TOKENIZER_FILES, find_model
from protocol.errors import ConfigError
from protocol.topology import Topology
from router.front.chat_template import load_chat_template


def add(commands: Any) -> None:
    """Describe the command to argparse."""
    parser = commands.add_parser("check", help="say whether a topology could start here")
    add_topology_arguments(parser)
    parser.set_defaults(run=run)


def add_topology_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that reads a topology."""
    parser.add_argument("config", type=Path, help="the topology, a YAML file (see configs/)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key of the topology; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one line when everything is fine; ConfigError says what is not."""
    topology, model = load_and_check(arguments)
    print(f"{arguments.config}: fine. {describe(topology)}")
    try:
        load_chat_template(find_model(topology.model.path, TOKENIZER_FILES))
    except ConfigError as error:
        print(f"{arguments.config}: {error}; all but /v1/chat/completions will be served")
    for line in remarks(topology, model):
        print(line)
    return 0


def load_and_check(arguments: argparse.Namespace) -> tuple[Topology, ModelFacts]:
    """Return the topology and its model's facts. Raise ConfigError for what could not run here."""
    topology, places = load_topology(arguments.config, arguments.set)
    try:
        model = check_topology(topology)
        check_this_machine(topology, has_cluster=uses_existing_cluster())
    except MisfitError as error:
        raise ConfigError(f"{place_of(error.key, places)}: {error}") from None
    return topology, model


def remarks(topology: Topology, model: ModelFacts) -> list[str]:
    """Return what works but may surprise, a line each."""
    is_shortened = model.shortened_context and topology.model.max_context is None
    return [model.shortened_context] if is_shortened else []


def describe(topology: Topology) -> str:
    """Return the topology in one line: "prefill 1 x TP1, decode 2 x TP2 of configs/demo_model on cpu"."""
    groups = ", ".join(f"{role} {section.groups} x TP{section.tensor_parallel}" for role, section in roles(topology))
    return f"{groups} of {topology.model.name or topology.model.path} on {topology.device}"
