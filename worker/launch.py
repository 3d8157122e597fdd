"""What one worker process needs to know to start: the driver encodes it, the Ray actor hands it to run_worker.

Plain data as MessagePack. Each part of the worker takes its own section out of it; nothing here changes after the
start, and a restarted worker gets the same bytes again.
"""

import msgspec

from protocol.messages import RoleName
from protocol.secret import Secret
from protocol.topology import AnyRoleSection, Device, Dtype, KVTransferSection


class ModelLaunch(msgspec.Struct, frozen=True):
    """path: a folder that exists on the worker's node, or a hub id. max_context: the longest context served."""

    path: str
    dtype: Dtype
    max_context: int


class CacheLaunch(msgspec.Struct, frozen=True):
    """One rank's KV cache: bytes of all its blocks, or, where that is None, a share of what the device has free."""

    memory_bytes: int | None
    share_of_free: float
    block_size: int
    prefix_caching: bool


class WorkerLaunch(msgspec.Struct, frozen=True):
    """One rank of one group. control is the router's address for workers, "tcp://host:port"; secret the cluster's.

    host: the address of this node that peers can reach; the actor fills it in, for only it knows where Ray put it.
    """

    role: RoleName
    group: int
    rank: int
    model: ModelLaunch
    role_section: AnyRoleSection
    kv_cache: CacheLaunch
    kv_transfer: KVTransferSection
    device: Device
    control: str
    secret: Secret
    host: str = ""

    @property
    def name(self) -> str:
        """For logs and for Ray's list of actors."""
        return f"{self.role}-{self.group}-rank{self.rank}"


_decoder = msgspec.msgpack.Decoder(WorkerLaunch)


def encode(launch: WorkerLaunch) -> bytes:
    """Return the launch as MessagePack."""
    return msgspec.msgpack.encode(launch)


def decode(data: bytes) -> WorkerLaunch:
    """Return the launch in data; raise msgspec.DecodeError when driver and worker run different versions."""
    return _decoder.decode(data)
