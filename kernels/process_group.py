"""Process groups of torch.distributed without its global state, listening on the configured host only.

Called by engine for tensor parallelism and by kv_transfer for pairs of ranks. init_process_group is never used, so that
a process can be in any number of groups, several of its threads can be ranks, and a broken group is simply let go.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def open_store(host: str, port: int, *, is_server: bool, timeout_s: float) -> dist.TCPStore:
    """Open the key-value store over which the ranks of one group find one another.

    is_server: listen on host, at a free port when port is 0 (store.port tells which); the store lives as long as that
    object. Otherwise connect to the one that listens at host and port. timeout_s also bounds every later wait for a
    key. Raises RuntimeError when nobody answers in time, OSError when host and port cannot be bound.
    """
    timeout = timedelta(seconds=timeout_s)
    if not is_server:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    # By itself, TCPStore listens on every interface.
    listener = socket.create_server((host, port), family=_family(host))
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )


def open_group(
    store: dist.Store, rank: int, size: int, host: str, device: str | torch.device, timeout_s: float
) -> dist.ProcessGroup:
    """Open rank's end of a group of size ranks; return when all have come. One store serves one group.

    host is where gloo listens (NCCL is told by NCCL_SOCKET_IFNAME instead). device: "cpu" gives gloo, "cuda" NCCL on
    that device. timeout_s bounds every operation, and this call but for what NCCL does by itself when it connects;
    after one that failed, abort() the group and drop it. Raises RuntimeError when a rank does not come in time.
    """
    device = torch.device(device)
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        return _connected(_group_over(store, rank, size, device, _nccl(store, rank, size, timeout)), device)
    return _group_over(store, rank, size, device, _gloo(store, rank, size, host, timeout))


def open_fragile_group(store: dist.Store, rank: int, size: int, device: torch.device) -> dist.ProcessGroup:
    """Open rank's end of a group over NCCL whose failure is its caller's business alone.

    By default torch ends the process when an operation of NCCL's fails or takes too long, on a thread of its own. Here
    nothing watches: the caller sets a deadline for every operation and calls abort() when it has passed. Blocks until
    all ranks have come, so be sure that they are there.
    """
    with _set_while_made(_UNWATCHED):
        backend = _nccl(store, rank, size, timedelta(days=365))
    return _connected(_group_over(store, rank, size, device, backend), device)


_UNWATCHED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Read by torch when a group is made, and never again for that group."""

_environment = threading.Lock()


@contextmanager
def _set_while_made(variables: dict[str, str]) -> Iterator[None]:
    """Let a group be made under these variables. Others wait, so nothing in here may wait for a peer."""
    with _environment:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _group_over(
    store: dist.Store, rank: int, size: int, device: torch.device, backend: dist.Backend
) -> dist.ProcessGroup:
    kinds = dist.ProcessGroup.BackendType
    kind = kinds.NCCL if device.type == "cuda" else kinds.GLOO
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(kind)
    group._register_backend(device, kind, backend)
    return group


def _gloo(store: dist.Store, rank: int, size: int, host: str, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> "dist.ProcessGroupNCCL":
    # Otherwise torch warns that a send uses the group's own communicator, which is what we want.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _connected(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Return a group over NCCL whose ranks have all come: a missing one shows now, not at the first collective."""
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    group._get_backend(device).eager_connect_single_device(device)
    return group


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
