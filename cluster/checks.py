"""What cannot work, said before anything starts: model, memory, port, packages, CPUs and GPUs.

Called by the command line with a topology that is well-formed. Imports neither torch nor ray, so that every refusal
comes within two seconds; what only a running Ray cluster can answer is asked by cluster/ray_session.py and judged here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from cluster.ports import check_port
from models.facts import ModelFacts
from models.files import TOKENIZER_FILES, find_model, find_weights
from models.loading import load_facts
from protocol.errors import ConfigError
from protocol.generation_config import load_sampling_defaults
from protocol.layout import KVLayout, keys_and_values
from protocol.memory_size import format_memory, parse_memory, parse_share
from protocol.messages import RoleName
from protocol.sockets import has_encryption
from protocol.topology import GPU_TRANSPORTS, AnyRoleSection, DecodeSection, RoleSection, Topology

_MAX_SOCKET_PATH = 107  # bytes, of any socket with a path
_SOCKET_OF_RAY = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


class MisfitError(ConfigError):
    """A well-formed value that cannot work; key is where it stands in the topology ("decode.tensor_parallel")."""

    def __init__(self, key: str, complaint: str) -> None:
        super().__init__(complaint)
        self.key = key


@contextmanager
def _about(key: str) -> Iterator[None]:
    """Say of every ConfigError inside that it is about key."""
    try:
        yield
    except ConfigError as error:
        raise MisfitError(key, str(error)) from None


def roles(topology: Topology) -> list[tuple[RoleName, AnyRoleSection]]:
    """Return the roles that the topology has, with their sections."""
    every: list[tuple[RoleName, AnyRoleSection | None]] = [
        ("prefill", topology.prefill),
        ("decode", topology.decode),
        ("colocated", topology.colocated),
    ]
    return [(name, section) for name, section in every if section is not None]


def check_topology(topology: Topology) -> ModelFacts:
    """Raise ConfigError for anything that no machine could run; return the model's facts."""
    _check_kernels_package()
    with _about("model.path"):
        folder = find_model(topology.model.path, TOKENIZER_FILES)
        model = load_facts(folder)
        if topology.router.sampling_defaults == "model":
            load_sampling_defaults(folder)
        if Path(topology.model.path).expanduser().is_dir():
            find_weights(folder)  # a model from the hub brings its weights later, on each worker's own node
    with _about("kv_transfer.min_fetch_tokens"):
        _check_fetching(topology)
    with _about("model.max_context"):
        max_context = longest_context(topology, model)
    for role, section in roles(topology):
        with _about(f"{role}.tensor_parallel"):
            _check_split(role, section, model)
        with _about("model.dtype"):
            layout = _layout(section, topology, model)
        with _about(_memory_key(role, section)):
            _check_cache(role, section, topology, layout, max_context)
        with _about(f"{role}.parked_memory"):
            _check_parking(role, section, layout, max_context)
        with _about(f"{role}.gpus"):
            _check_gpu_share(role, section, topology)
    with _about("kv_transfer.transport"):
        _check_transport(topology)
    return model


def check_this_machine(topology: Topology, has_cluster: bool) -> None:
    """Raise ConfigError when the router cannot run here, or when no cluster helps and Ray cannot run all this here."""
    if not has_encryption():
        raise ConfigError("pyzmq was built here without CURVE, which keeps strangers out; install its wheel instead")
    with _about("router.port"):
        check_port(topology.router.host, topology.router.port)
    if not has_cluster:
        check_folder_of_ray()
        check_resources(topology, num_cpus=num_local_cpus(), num_gpus=num_local_gpus(), where="this machine")


def check_folder_of_ray() -> None:
    """Raise ConfigError when the paths of Ray's sockets would be too long for the kernel."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if name is None:
        return
    most = _MAX_SOCKET_PATH - len(_SOCKET_OF_RAY)
    if len(os.fsencode(os.environ[name])) > most:
        raise ConfigError(
            f"{name} is {os.environ[name]}; Ray puts sockets below it, whose paths may have {_MAX_SOCKET_PATH} bytes: "
            f"set RAY_TMPDIR to a folder of at most {most} bytes, for example /tmp"
        )


def check_resources(topology: Topology, num_cpus: float, num_gpus: float, where: str) -> None:
    """Raise ConfigError when the ranks want more than there is."""
    want_cpus = sum(section.cpus * count for section, count in _ranks(topology))
    want_gpus = sum(gpu_share(topology, section) * count for section, count in _ranks(topology))
    if want_gpus and not num_gpus:
        raise MisfitError(
            "device", f"device is cuda, but {where} has no GPU; set device: cpu, or start on a machine with GPUs"
        )
    for name, want, have in (("CPUs", want_cpus, num_cpus), ("GPUs", want_gpus, num_gpus)):
        if want > have + 1e-6:
            key = name.lower()
            raise ConfigError(
                f"the ranks want {want:g} {name}, {where} has {have:g}; "
                f"take fewer groups, a smaller tensor_parallel or a smaller share ({key} of each role)"
            )


def longest_context(topology: Topology, model: ModelFacts) -> int:
    """Return the longest context served. Raise ConfigError when the topology asks for more than the model can."""
    asked = topology.model.max_context or model.max_context
    if asked > model.max_context:
        raise ConfigError(
            f"model.max_context is {asked}, but the model was made for at most {model.max_context}"
            f"{' (its sliding window)' if model.shortened_context else ''}"
        )
    return asked


def gpu_share(topology: Topology, section: RoleSection) -> float:
    """Return each rank's share of a GPU: none on a CPU, and one unless the topology says otherwise."""
    if topology.device == "cpu":
        return 0.0
    return 1.0 if section.gpus is None else section.gpus


def num_local_cpus() -> int:
    return os.cpu_count() or 1


def num_local_gpus() -> int:
    """Return the number of NVIDIA devices that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return present if visible is None else min(present, len([name for name in visible.split(",") if name.strip()]))


def _ranks(topology: Topology) -> Iterator[tuple[RoleSection, int]]:
    for _, section in roles(topology):
        yield section, section.groups * section.tensor_parallel


def _check_kernels_package() -> None:
    try:
        found = distribution("kernels")
    except PackageNotFoundError:
        return
    raise ConfigError(
        f"the package kernels {found.version} (Hugging Face's) is installed, and our folder of that name hides it, "
        f"which breaks transformers; pip uninstall kernels, or run from an environment without it"
    )


def _check_split(role: RoleName, section: RoleSection, model: ModelFacts) -> None:
    try:
        model.check_tensor_parallel(section.tensor_parallel)
    except ConfigError as error:
        raise ConfigError(f"{role}.tensor_parallel: {error}") from None


def _layout(section: RoleSection, topology: Topology, model: ModelFacts) -> KVLayout:
    """Return how a group of this role will lay out its KV."""
    planes = keys_and_values(model.num_kv_heads, model.head_dim, model.served_dtype(topology.model.dtype))
    block_size = topology.cache_of(section).block_size
    return KVLayout("not computed yet", model.num_layers, planes, block_size, section.tensor_parallel)


def _memory_key(role: RoleName, section: RoleSection) -> str:
    """Return where it stands how much memory this role's cache has."""
    return f"{role}.kv_cache.memory" if section.kv_cache.memory else "kv_cache.memory"


def _check_cache(role: RoleName, section: RoleSection, topology: Topology, layout: KVLayout, max_context: int) -> None:
    """Every rank must hold the KV of one request of full length, or that request could never be served."""
    cache, key = topology.cache_of(section), _memory_key(role, section)
    if parse_share(cache.memory) is not None:
        _check_share(role, section, topology)
        return
    num_blocks = -(-max_context // cache.block_size)
    held = parse_memory(cache.memory) // layout.block_bytes
    if held < num_blocks:
        remedy = f" or model.max_context to {held * cache.block_size}" if held else ""
        raise ConfigError(
            f"{key} {cache.memory} holds {held * cache.block_size} tokens on each {role} rank, fewer than one context "
            f"of {max_context}; raise it to {format_memory(num_blocks * layout.block_bytes)}{remedy}"
        )


def _check_fetching(topology: Topology) -> None:
    num_tokens, decode = topology.kv_transfer.min_fetch_tokens, topology.decode
    if num_tokens and decode and not topology.cache_of(decode).prefix_caching:
        raise ConfigError(
            f"kv_transfer.min_fetch_tokens is {num_tokens}, but decode keeps no prefixes that prefill could fetch; "
            f"set it to 0, or prefix_caching of decode's kv_cache to true"
        )


def _check_parking(role: RoleName, section: RoleSection, layout: KVLayout, max_context: int) -> None:
    """With less parked_memory than one request needs, growth_tokens would have no effect."""
    if not isinstance(section, DecodeSection) or section.growth_tokens is None:
        return
    needed = -(-max_context // layout.block_size) * layout.block_bytes
    if parse_memory(section.parked_memory) < needed:
        raise ConfigError(
            f"{role}.parked_memory {section.parked_memory} holds less than one context of {max_context}, so no request "
            f"of full length could begin with {section.growth_tokens} growth_tokens; raise it to "
            f"{format_memory(needed)} or leave growth_tokens out"
        )


def _check_share(role: RoleName, section: RoleSection, topology: Topology) -> None:
    """Whether one context fits is known when the GPU has been asked; two ranks that ask at once would both take it."""
    memory = f"{_memory_key(role, section)} {topology.cache_of(section).memory}"
    if topology.device != "cuda":
        raise ConfigError(f"{memory} needs device cuda; on a CPU give bytes, as 512MiB")
    share = gpu_share(topology, section)
    if share < 1:
        raise ConfigError(
            f"{memory} of a GPU that a {role} rank shares with others ({role}.gpus is {share:g}); give bytes, as 20GiB"
        )


def _check_gpu_share(role: RoleName, section: RoleSection, topology: Topology) -> None:
    share = gpu_share(topology, section)
    if topology.device == "cuda" and (share == 0 or (share > 1 and share % 1)):
        raise ConfigError(f"{role}.gpus is {share:g}; with device cuda it is a fraction of one GPU, or a whole number")


def _check_transport(topology: Topology) -> None:
    name = topology.kv_transfer.transport
    if name in GPU_TRANSPORTS and topology.device != "cuda":
        raise ConfigError(
            f"kv_transfer.transport {name} moves KV between GPUs, but device is {topology.device}; "
            f"set device: cuda, or a transport that needs none (auto, shm, zmq, gloo)"
        )
