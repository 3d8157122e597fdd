"""The transports over torch.distributed: gloo between hosts' memories, nccl between GPUs.

What they differ in is here: the communicator, and where payloads lie. sender.py and receiver.py are the
same for both. With a cache on a GPU, gloo's payloads are staged in the host's memory; nccl's never leave the GPUs.
"""

from functools import partial

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.buffers import Buffers, host_buffers
from kv_transfer.transports.torch.communicator import Backend, GlooCommunicator, NcclCommunicator
from kv_transfer.transports.torch.receiver import TorchReceiver
from kv_transfer.transports.torch.sender import TorchSender
from kv_transfer.transports.transport import Arrival, Settled, Site


def gloo(site: Site) -> Backend:
    """Return the backend of payloads in the host's memory."""
    communicator = partial(GlooCommunicator, host=site.host, timeout_s=site.timeout_s)
    return Backend("gloo", communicator, host_buffers(site.device))


def nccl(site: Site) -> Backend:
    """Return the backend of payloads on the site's GPU."""
    communicator = partial(NcclCommunicator, device=site.device, timeout_s=site.timeout_s)
    return Backend("nccl", communicator, Buffers(site.device))


def open_gloo_sender(site: Site, settled: Mailbox[Settled]) -> TorchSender:
    """Return a SendingTransport over gloo."""
    return TorchSender(gloo(site), site, settled)


def open_gloo_receiver(site: Site, arrivals: Mailbox[Arrival]) -> TorchReceiver:
    """Return a ReceivingTransport over gloo."""
    return TorchReceiver(gloo(site), site, arrivals)


def open_nccl_sender(site: Site, settled: Mailbox[Settled]) -> TorchSender:
    """Return a SendingTransport over NCCL."""
    return TorchSender(nccl(site), site, settled)


def open_nccl_receiver(site: Site, arrivals: Mailbox[Arrival]) -> TorchReceiver:
    """Return a ReceivingTransport over NCCL."""
    return TorchReceiver(nccl(site), site, arrivals)
