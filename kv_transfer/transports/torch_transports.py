"""The transports over torch.distributed: gloo between hosts' memories, nccl between GPUs.

What they differ in is here: the communicator, and where payloads lie. torch_sender.py and torch_receiver.py are the
same for both. With a cache on a GPU, gloo's payloads are staged in the host's memory; nccl's never leave the GPUs.
"""

from functools import partial

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.buffers import Buffers, host_buffers
from kv_transfer.transports.communicator import GlooCommunicator, NcclCommunicator
from kv_transfer.transports.torch_receiver import TorchReceiver
from kv_transfer.transports.torch_sender import TorchSender
from kv_transfer.transports.transport import Arrival, Settled, Site


def open_gloo_sender(site: Site, settled: Mailbox[Settled]) -> TorchSender:
    """Return a SendingTransport over gloo."""
    communicator = partial(GlooCommunicator, host=site.host, timeout_s=site.timeout_s)
    return TorchSender("gloo", site, settled, communicator, host_buffers(site.device))


def open_gloo_receiver(site: Site, arrivals: Mailbox[Arrival]) -> TorchReceiver:
    """Return a ReceivingTransport over gloo."""
    communicator = partial(GlooCommunicator, host=site.host, timeout_s=site.timeout_s)
    return TorchReceiver(site, arrivals, communicator, host_buffers(site.device))


def open_nccl_sender(site: Site, settled: Mailbox[Settled]) -> TorchSender:
    """Return a SendingTransport over NCCL."""
    communicator = partial(NcclCommunicator, device=site.device, timeout_s=site.timeout_s)
    return TorchSender("nccl", site, settled, communicator, Buffers(site.device))


def open_nccl_receiver(site: Site, arrivals: Mailbox[Arrival]) -> TorchReceiver:
    """Return a ReceivingTransport over NCCL."""
    communicator = partial(NcclCommunicator, device=site.device, timeout_s=site.timeout_s)
    return TorchReceiver(site, arrivals, communicator, Buffers(site.device))
