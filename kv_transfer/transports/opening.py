"""A transport by its name in the topology. Called by both roles when they start."""

from kv_transfer.transports.torch_receiver import TorchReceiver
from kv_transfer.transports.torch_sender import TorchSender
from kv_transfer.transports.transport import ReceivingTransport, SendingTransport
from kv_transfer.transports.zmq_receiver import ZmqReceiver
from kv_transfer.transports.zmq_sender import ZmqSender
from protocol.topology import Transport

_SENDERS: dict[Transport, type[ZmqSender] | type[TorchSender]] = {"zmq": ZmqSender, "gloo": TorchSender}
_RECEIVERS: dict[Transport, type[ZmqReceiver] | type[TorchReceiver]] = {"zmq": ZmqReceiver, "gloo": TorchReceiver}


def open_sender(name: Transport, host: str, timeout_s: float) -> SendingTransport:
    """Open the sending side. host is where it may listen; timeout_s bounds every wait for a peer."""
    return _SENDERS[name](host, timeout_s)


def open_receiver(name: Transport, host: str, timeout_s: float) -> ReceivingTransport:
    """Open the receiving side, which listens on host only."""
    return _RECEIVERS[name](host, timeout_s)
