"""The largest steps that a worker ever runs, and how much memory its KV cache may take. Given to the engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """batch_tokens: tokens of one step; batch_requests: sequences of one step; max_context: tokens of one sequence."""

    batch_tokens: int = 2048
    batch_requests: int = 256
    max_context: int = 2048


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class ShareOfFree:
    """A share, above 0 and at most 1, of what is free on the device once everything else has its place."""

    share: float


KVMemory = int | ShareOfFree
"""Bytes on each rank, or a share of what is free there."""
