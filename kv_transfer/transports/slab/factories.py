"""The transports through memory that both ends share: shm in the host's, cuda_ipc in a GPU's.

What they differ in is here: the memory, and which receivers it reaches. sender.py and receiver.py are the
same for both. With a cache on a GPU, shm's payloads are staged in the host's memory; cuda_ipc's never leave the GPU,
and are copied by two kernels, out of the sender's blocks and into the receiver's.
"""

from functools import partial
from typing import TypeVar

from kv_transfer.mailbox import Mailbox
from kv_transfer.transports.host_identity import host_identity
from kv_transfer.transports.listener import Listener
from kv_transfer.transports.slab.device_memory import gpu_name, pin, reachable_gpus
from kv_transfer.transports.slab.device_slab import DeviceSlabs, open_device_slab
from kv_transfer.transports.slab.host_slab import HostSlab, Slab, open_host_slab
from kv_transfer.transports.slab.reach import Reach
from kv_transfer.transports.slab.receiver import open_slab_receiver
from kv_transfer.transports.slab.sender import SlabSender
from kv_transfer.transports.transport import Arrival, Settled, Site

SlabT = TypeVar("SlabT", bound=Slab)


def host_reach() -> Reach:
    """Return whom shared memory of this host reaches."""
    place = host_identity()
    return Reach("shm", place, frozenset([place]))


def device_reach(site: Site) -> Reach:
    """Return whom memory of the site's GPU reaches: ranks of this host on the same GPU, or on one that reads it."""
    host = host_identity()
    reachable = frozenset(f"{host}/{gpu}" for gpu in reachable_gpus(site.device))
    return Reach("cuda_ipc", f"{host}/{gpu_name(site.device)}", reachable)


def open_shm_sender(site: Site, settled: Mailbox[Settled]) -> SlabSender:
    """Return a SendingTransport through shared memory."""
    return SlabSender(host_reach(), lambda: _suited_to(site, HostSlab()), site, settled)


def open_shm_receiver(site: Site, arrivals: Mailbox[Arrival]) -> Listener:
    """Return a ReceivingTransport through shared memory."""
    return open_slab_receiver(host_reach(), lambda lent: _suited_to(site, open_host_slab(lent)), site, arrivals)


def open_cuda_ipc_sender(site: Site, settled: Mailbox[Settled]) -> SlabSender:
    """Return a SendingTransport through a GPU's memory."""
    return SlabSender(device_reach(site), DeviceSlabs(site.device).new, site, settled)


def open_cuda_ipc_receiver(site: Site, arrivals: Mailbox[Arrival]) -> Listener:
    """Return a ReceivingTransport through a GPU's memory."""
    return open_slab_receiver(device_reach(site), partial(open_device_slab, device=site.device), site, arrivals)


def _suited_to(site: Site, slab: SlabT) -> SlabT:
    """Return slab, pinned when a GPU copies to or from it."""
    if site.device.type == "cuda":
        pin(slab.memory, slab)
    return slab
