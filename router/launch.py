"""What the router is told when it starts: one JSON line on stdin, and what it answers on stdout.

Written by cluster, read by router/__main__.py. No other configuration reaches the router.
"""

import os
from pathlib import Path

import msgspec

from protocol.errors import ConfigError
from protocol.messages import RoleName
from protocol.secret import Secret
from protocol.topology import Positive, RouterSection

MAX_LAUNCH_BYTES = 1 << 20


class GroupSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group that is expected to join; its ranks are 0 to tensor_parallel - 1."""

    role: RoleName
    group: int
    tensor_parallel: Positive = 1


class RouterLaunch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """section: where clients connect and how to choose groups. control_host: interface of the workers' socket.

    model_folder is absolute and resolved; model_name is what clients call it. is_fetching: whether prefill groups fetch
    from decode groups, and want to know when that may pay. secret: of the cluster; None: the user's own.
    """

    section: RouterSection
    control_host: str
    model_folder: str
    model_name: str
    max_context: Positive
    vocab_size: Positive
    groups: tuple[GroupSpec, ...]
    is_fetching: bool = False
    secret: Secret | None = None


class Addresses(msgspec.Struct, frozen=True):
    """The router's answer on stdout, once both sockets are bound: tcp://host:port and http://host:port."""

    control: str
    http: str


def read_launch(fd: int) -> RouterLaunch:
    """Return the launch written as the first line of fd. Raise ConfigError, naming what is wrong."""
    line = _read_line(fd)
    try:
        launch = msgspec.json.decode(line, type=RouterLaunch)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the first line of stdin must be a RouterLaunch in JSON: {error}") from None
    if not Path(launch.model_folder).is_dir():
        raise ConfigError(f"model_folder {launch.model_folder} is not a folder")
    _check_groups(launch.groups)
    return launch


def _read_line(fd: int) -> bytes:
    line = b""
    while b"\n" not in line and len(line) < MAX_LAUNCH_BYTES:
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        line += chunk
    return line.partition(b"\n")[0]


def _check_groups(groups: tuple[GroupSpec, ...]) -> None:
    roles = {spec.role for spec in groups}
    if roles not in ({"prefill", "decode"}, {"colocated"}):
        raise ConfigError(f"groups must be of prefill and decode, or of colocated; got {sorted(roles) or 'none'}")
    if len({(spec.role, spec.group) for spec in groups}) != len(groups):
        raise ConfigError("groups name the same role and group twice")
