"""Memory of one GPU, seen by two processes of one host: described as bytes by its owner, opened by another.

Used by device_slab.py and factories.py. What travels are the fields of CUDA's IPC handle as torch makes them, as
MessagePack; torch keeps memory that was described for as long as a process that opened it lives and has not let go.
"""

import weakref
from typing import Any

import msgspec
import torch

from protocol.errors import UNPARSABLE


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """What torch's storages need of one another. counter: a file in which torch counts who still uses the memory."""

    memory: bytes
    num_bytes: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    is_event_needed: bool


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Handle)


def describe(memory: torch.Tensor) -> bytes:
    """Return what another process opens memory by, once; memory is contiguous and has its storage to itself."""
    _, *fields = memory.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    return _encoder.encode(_Handle(*fields))


def opened(description: bytes, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return described memory of another process as uint8 [num_bytes] for kernels on device.

    Raises ValueError when it is something else, RuntimeError when device cannot reach it.
    """
    try:
        handle = _decoder.decode(description)
    except UNPARSABLE as error:
        raise ValueError(f"a description of GPU memory that does not parse: {error}") from error
    if handle.num_bytes != num_bytes:
        raise ValueError(f"GPU memory of {handle.num_bytes} bytes; a slab has {num_bytes}")
    with torch.cuda.device(device):
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *msgspec.structs.astuple(handle))
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (num_bytes,), (1,))


def reachable_gpus(device: torch.device) -> frozenset[str]:
    """Return the names of all GPUs whose memory kernels on device can read: itself, and its peers that are visible."""
    visible = range(torch.cuda.device_count())
    peers = [index for index in visible if torch.cuda.can_device_access_peer(device.index, index)]
    return frozenset(gpu_name(torch.device("cuda", index)) for index in {device.index, *peers})


def gpu_name(device: torch.device) -> str:
    """Return a name that no other GPU has, the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def pin(memory: torch.Tensor, owner: object) -> None:
    """Let a GPU copy to and from this memory of the host at full speed, for as long as owner lives."""
    torch.cuda.check_error(int(_cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    weakref.finalize(owner, _unpin, memory)  # which keeps it mapped until then


def _unpin(memory: torch.Tensor) -> None:
    torch.cuda.synchronize()  # a copy of a frame that was given up may be under way
    torch.cuda.check_error(int(_cudart().cudaHostUnregister(memory.data_ptr())))


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
