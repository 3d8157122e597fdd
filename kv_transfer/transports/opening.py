"""A transport by its name in the topology. Called by both roles when they start."""

from collections.abc import Callable

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.automatic import AutomaticReceiver, AutomaticSender
from kv_transfer.transports.host_identity import host_identity
from kv_transfer.transports.slab.factories import (
    device_reach,
    host_reach,
    open_cuda_ipc_receiver,
    open_cuda_ipc_sender,
    open_shm_receiver,
    open_shm_sender,
)
from kv_transfer.transports.tcp.receiver import open_tcp_receiver
from kv_transfer.transports.tcp.sender import TcpSender
from kv_transfer.transports.torch.factories import (
    open_gloo_receiver,
    open_gloo_sender,
    open_nccl_receiver,
    open_nccl_sender,
)
from kv_transfer.transports.transport import INBOX_BYTES, Arrival, ReceivingTransport, SendingTransport, Settled, Site
from protocol.topology import Transport

_ON_ONE_HOST: tuple[Transport, ...] = ("cuda_ipc", "shm")
_BETWEEN_GPUS: tuple[Transport, ...] = ("cuda_ipc", "nccl")


def automatic_names(site: Site) -> tuple[Transport, ...]:
    """Return the transports that "auto" can choose from at this end, best first."""
    best_first: tuple[Transport, ...] = ("cuda_ipc", "nccl", "shm", "zmq")
    missing = {*(() if host_identity() else _ON_ONE_HOST), *(() if site.device.type == "cuda" else _BETWEEN_GPUS)}
    return tuple(name for name in best_first if name not in missing)


def _open_automatic_sender(site: Site, settled: Mailbox[Settled]) -> AutomaticSender:
    names = automatic_names(site)
    reaches = {"shm": host_reach().reaches}
    if "cuda_ipc" in names:
        reaches["cuda_ipc"] = device_reach(site).reaches
    return AutomaticSender({name: _SENDERS[name](site, settled) for name in names}, reaches, settled)


def _open_automatic_receiver(site: Site, arrivals: Mailbox[Arrival]) -> AutomaticReceiver:
    return AutomaticReceiver({name: _RECEIVERS[name](site, arrivals) for name in automatic_names(site)}, arrivals)


_SENDERS: dict[Transport, Callable[[Site, Mailbox[Settled]], SendingTransport]] = {
    "auto": _open_automatic_sender,
    "cuda_ipc": open_cuda_ipc_sender,
    "nccl": open_nccl_sender,
    "shm": open_shm_sender,
    "zmq": TcpSender,
    "gloo": open_gloo_sender,
}
_RECEIVERS: dict[Transport, Callable[[Site, Mailbox[Arrival]], ReceivingTransport]] = {
    "auto": _open_automatic_receiver,
    "cuda_ipc": open_cuda_ipc_receiver,
    "nccl": open_nccl_receiver,
    "shm": open_shm_receiver,
    "zmq": open_tcp_receiver,
    "gloo": open_gloo_receiver,
}


def open_sender(name: Transport, site: Site) -> SendingTransport:
    """Open the sending side."""
    return _SENDERS[name](site, Mailbox(0))


def open_receiver(name: Transport, site: Site) -> ReceivingTransport:
    """Open the receiving side, which listens on the site's host only."""
    return _RECEIVERS[name](site, Mailbox(INBOX_BYTES))
