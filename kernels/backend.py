"""Which implementation of each operation a device gets. Called once by the engine when it is built.

Only the plain-torch set exists so far; a fused set takes its place here, device type by device type.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.plain.attention_decode import attention_decode
from kernels.plain.attention_prefill import attention_prefill
from kernels.plain.rms_norm import add_rms_norm, rms_norm
from kernels.plain.rope_and_write_kv import rope_and_write_kv
from kernels.plain.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class Operations:
    """One implementation of every operation of a forward pass; signatures are those of kernels/plain."""

    attention_decode: Callable[..., Tensor]
    attention_prefill: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_and_write_kv: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]


PLAIN = Operations(attention_decode, attention_prefill, rms_norm, add_rms_norm, rope_and_write_kv, silu_mul)


def operations_for(device: torch.device) -> Operations:
    """Return the operations to use on device."""
    return {"cpu": PLAIN, "cuda": PLAIN}[device.type]
