"""A transport by its name in the topology. Called by both roles when they start."""

from collections.abc import Callable

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.automatic import AutomaticReceiver, AutomaticSender
from kv_transfer.transports.host_identity import host_identity
from kv_transfer.transports.shm_receiver import open_shm_receiver
from kv_transfer.transports.shm_sender import open_shm_sender
from kv_transfer.transports.torch_receiver import TorchReceiver
from kv_transfer.transports.torch_sender import TorchSender
from kv_transfer.transports.transport import INBOX_BYTES, Arrival, ReceivingTransport, SendingTransport, Settled
from kv_transfer.transports.zmq_receiver import ZmqReceiver
from kv_transfer.transports.zmq_sender import open_zmq_sender
from protocol.topology import Transport


def _open_automatic_sender(host: str, timeout_s: float, settled: Mailbox[Settled]) -> AutomaticSender:
    names: tuple[Transport, ...] = ("shm", "zmq")
    return AutomaticSender({name: _SENDERS[name](host, timeout_s, settled) for name in names}, settled)


def _open_automatic_receiver(host: str, timeout_s: float, arrivals: Mailbox[Arrival]) -> AutomaticReceiver:
    names: tuple[Transport, ...] = ("shm", "zmq") if host_identity() else ("zmq",)
    return AutomaticReceiver({name: _RECEIVERS[name](host, timeout_s, arrivals) for name in names}, arrivals)


_SENDERS: dict[Transport, Callable[[str, float, Mailbox[Settled]], SendingTransport]] = {
    "auto": _open_automatic_sender,
    "shm": open_shm_sender,
    "zmq": open_zmq_sender,
    "gloo": TorchSender,
}
_RECEIVERS: dict[Transport, Callable[[str, float, Mailbox[Arrival]], ReceivingTransport]] = {
    "auto": _open_automatic_receiver,
    "shm": open_shm_receiver,
    "zmq": ZmqReceiver,
    "gloo": TorchReceiver,
}


def open_sender(name: Transport, host: str, timeout_s: float) -> SendingTransport:
    """Open the sending side. host is where it may listen; timeout_s bounds every wait for a peer."""
    return _SENDERS[name](host, timeout_s, Mailbox(0))


def open_receiver(name: Transport, host: str, timeout_s: float) -> ReceivingTransport:
    """Open the receiving side, which listens on host only."""
    return _RECEIVERS[name](host, timeout_s, Mailbox(INBOX_BYTES))
