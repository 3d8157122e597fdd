"""A transport by its name in the topology. Called by both roles when they start."""

from collections.abc import Callable

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.automatic import AutomaticReceiver, AutomaticSender
from kv_transfer.transports.host_identity import host_identity
from kv_transfer.transports.shm_receiver import ShmReceiver
from kv_transfer.transports.shm_sender import ShmSender
from kv_transfer.transports.torch_transports import (
    open_gloo_receiver,
    open_gloo_sender,
    open_nccl_receiver,
    open_nccl_sender,
)
from kv_transfer.transports.transport import INBOX_BYTES, Arrival, ReceivingTransport, SendingTransport, Settled, Site
from kv_transfer.transports.zmq_receiver import ZmqReceiver
from kv_transfer.transports.zmq_sender import ZmqSender
from protocol.topology import Transport


def _open_automatic_sender(site: Site, settled: Mailbox[Settled]) -> AutomaticSender:
    names: tuple[Transport, ...] = ("shm", "zmq")
    return AutomaticSender({name: _SENDERS[name](site, settled) for name in names}, settled)


def _open_automatic_receiver(site: Site, arrivals: Mailbox[Arrival]) -> AutomaticReceiver:
    names: tuple[Transport, ...] = ("shm", "zmq") if host_identity() else ("zmq",)
    return AutomaticReceiver({name: _RECEIVERS[name](site, arrivals) for name in names}, arrivals)


_SENDERS: dict[Transport, Callable[[Site, Mailbox[Settled]], SendingTransport]] = {
    "auto": _open_automatic_sender,
    "shm": ShmSender,
    "zmq": ZmqSender,
    "gloo": open_gloo_sender,
    "nccl": open_nccl_sender,
}
_RECEIVERS: dict[Transport, Callable[[Site, Mailbox[Arrival]], ReceivingTransport]] = {
    "auto": _open_automatic_receiver,
    "shm": ShmReceiver,
    "zmq": ZmqReceiver,
    "gloo": open_gloo_receiver,
    "nccl": open_nccl_receiver,
}


def open_sender(name: Transport, site: Site) -> SendingTransport:
    """Open the sending side."""
    return _SENDERS[name](site, Mailbox(0))


def open_receiver(name: Transport, site: Site) -> ReceivingTransport:
    """Open the receiving side, which listens on the site's host only."""
    return _RECEIVERS[name](site, Mailbox(INBOX_BYTES))
