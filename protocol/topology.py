"""The sections of a topology, frozen. Every part receives its own section, never the whole.

Reading the YAML, with file and line in every complaint, is cluster/topology_file.py's work.
"""

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1_000_000)]
"""At most eleven days: JSON has no infinity, and sockets count milliseconds in 32 bits."""

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Transport = Literal["auto", "cuda_ipc", "nccl", "shm", "zmq", "gloo"]
GPU_TRANSPORTS: tuple[Transport, ...] = ("cuda_ipc", "nccl")
"""Those that need device: cuda."""

PolicyName = Literal["round_robin", "least_loaded"]
Device = Literal["cpu", "cuda"]
BlockSize = Literal[16, 32, 64, 128]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: an unknown key is an error, never ignored."""


class ModelSection(Section, frozen=True, kw_only=True):
    """path: a folder or a hub id. name: what clients call the model (default: the path as written)."""

    path: str
    dtype: Dtype = "auto"
    name: str | None = None
    max_context: Positive | None = None


class ClientLimits(Section, frozen=True, kw_only=True):
    """What clients may hold of the router at once, all together and those of one address.

    Behind a proxy all have one address. body_memory: of bodies that are still arriving; each one's first 64 KiB are
    not counted. An IPv6 network of 64 bits counts as one address.
    """

    connections: Positive = 8192
    connections_per_address: Positive = 4096
    body_memory: str = "256MiB"
    body_memory_per_address: str = "64MiB"


class RouterSection(Section, frozen=True, kw_only=True):
    """Where clients connect. grace_s: how long a drain waits for running requests; timeout_s: a request's deadline.

    sampling_defaults: model takes what a request does not say from the model's generation_config.json, none does not.
    canary_s: how long a pair of groups may be idle before the router tries it with a request of its own; 0: for ever.
    cors_origins: whose pages a browser lets call us, as https://chat.example.org, or "*" for everybody's.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    policy: PolicyName = "least_loaded"
    grace_s: Seconds = 30.0
    timeout_s: Seconds = 600.0
    canary_s: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)] = 15.0
    limits: ClientLimits = ClientLimits()
    sampling_defaults: Literal["model", "none"] = "model"
    cors_origins: tuple[str, ...] = ()


class RoleCacheSection(Section, frozen=True, kw_only=True):
    """Where a role's KV cache differs from the topology's kv_cache. None: it does not."""

    block_size: BlockSize | None = None
    memory: str | None = None
    prefix_caching: bool | None = None


class RoleSection(Section, frozen=True, kw_only=True, tag_field="role"):
    """Groups of one role, whichever it is. batch_tokens bounds one forward pass, batch_requests what runs at once.

    cpus is each rank's share of the Ray cluster's CPUs (fractions are fine) and, rounded down, its threads (at least
    one). gpus is each rank's share of a GPU; None: one each when device is cuda.
    """

    groups: Positive = 1
    tensor_parallel: Positive = 1
    batch_tokens: Positive = 2048
    batch_requests: Positive = 256
    cpus: Annotated[float, msgspec.Meta(gt=0)] = 0.25
    gpus: Annotated[float, msgspec.Meta(ge=0)] | None = None
    kv_cache: RoleCacheSection = RoleCacheSection()


class PrefillSection(RoleSection, frozen=True, kw_only=True, tag="prefill"):
    """outbox_share: how much of a group's blocks prompts may take before decode has granted them; 1: all, 0: none.

    What is computed ahead of its grant leaves as soon as that has come. Whatever this says, a prompt that has a grant
    takes blocks away from those that have none, and theirs are computed again.
    """

    outbox_share: Share = 0.5


class DecodeSection(RoleSection, frozen=True, kw_only=True, tag="decode"):
    """growth_tokens: how much of an answer has its blocks from the start, and how much more it gets each time they are
    used up; None: all of it from the start, so that nothing that runs is ever set aside.

    parked_memory: bytes of host memory per rank for the KV of sequences that were set aside, as 512MiB or 20GiB. A
    request for whose longest answer there is no room left there gets the blocks of all of it from the start.
    """

    growth_tokens: Positive | None = None
    parked_memory: str = "4GiB"


class ColocatedSection(DecodeSection, frozen=True, kw_only=True, tag="colocated"):
    """Both roles on one engine. Prompts are computed into what decode has reserved, so there is no outbox."""


AnyRoleSection = PrefillSection | DecodeSection | ColocatedSection


class KVCacheSection(Section, frozen=True, kw_only=True):
    """memory: bytes per rank for KV blocks, as 512MiB or 20GiB; on a GPU also 90% of what all else leaves.

    A role may override each of them for itself.
    """

    block_size: BlockSize = 16
    memory: str = "512MiB"
    prefix_caching: bool = True


class KVTransferSection(Section, frozen=True, kw_only=True):
    """How KV bytes get from prefill to decode.

    timeout_s bounds every single operation but the opening of an NCCL pair.

    transport auto: between GPUs cuda_ipc where both ranks are on one host and one GPU can read the other, nccl
    elsewhere; otherwise shm where both ranks are on one host, zmq elsewhere. min_fetch_tokens: prefill fetches the
    beginning of a prompt from decode, instead of computing it, where decode holds at least so many tokens more; 0: it
    never does.
    """

    transport: Transport = "zmq"
    timeout_s: Seconds = 30.0
    min_fetch_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0


class Topology(Section, frozen=True, kw_only=True):
    """A whole cluster: either prefill and decode, or colocated."""

    model: ModelSection
    router: RouterSection = RouterSection()
    prefill: PrefillSection | None = None
    decode: DecodeSection | None = None
    colocated: ColocatedSection | None = None
    kv_cache: KVCacheSection = KVCacheSection()
    kv_transfer: KVTransferSection = KVTransferSection()
    device: Device = "cpu"

    def cache_of(self, section: RoleSection) -> KVCacheSection:
        """Return the KV cache of a role: what it says itself, and kv_cache for the rest."""
        own = {key: value for key, value in msgspec.structs.asdict(section.kv_cache).items() if value is not None}
        return msgspec.structs.replace(self.kv_cache, **own)
