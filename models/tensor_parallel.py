"""One rank's place in its tensor-parallel group: which slice of the model is its own, and how partial results meet.

Used by the weights (what to read), the model (where to add up) and the KV cache (which heads). Works on a
torch.distributed process group object, never on the global one, so that several ranks may live in one process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from models.facts import Split
from protocol.errors import GroupError


@dataclass(frozen=True, slots=True)
class Range:
    """Indices [start, stop) of one dimension of the whole model."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def moved(self, by: int) -> "Range":
        """Return the range of what stands behind by other elements."""
        return Range(self.start + by, self.stop + by)

    def times(self, size: int) -> "Range":
        """Return the range of elements when each index stands for size of them, as a head does for its dimensions."""
        return Range(self.start * size, self.stop * size)


class TensorParallel:
    """Rank `rank` of `size`. process_group is None exactly when size is 1; then every call here does nothing."""

    def __init__(self, rank: int, size: int, process_group: dist.ProcessGroup | None = None) -> None:
        assert 0 <= rank < size
        assert (size == 1) == (process_group is None)
        self.rank = rank
        self.size = size
        self._group = process_group

    def even(self, total: int) -> Range:
        """Return this rank's slice of a dimension that the size divides: attention heads, intermediate features."""
        width = total // self.size
        return Range(self.rank * width, (self.rank + 1) * width)

    def kv_heads(self, total: int) -> Range:
        """Return this rank's KV heads; with fewer heads than ranks, neighbouring ranks hold copies of one head."""
        if total >= self.size:
            return self.even(total)
        head = self.rank * total // self.size
        return Range(head, head + 1)

    def share(self, split: Split) -> Range:
        """Return this rank's units of a dimension that the ranks share."""
        return self.kv_heads(split.number) if split.may_repeat else self.even(split.number)

    def vocabulary(self, total: int) -> Range:
        """Return this rank's token ids: equal shards, except that the last ones may be shorter or empty."""
        width = self.vocabulary_width(total)
        return Range(min(self.rank * width, total), min((self.rank + 1) * width, total))

    def vocabulary_width(self, total: int) -> int:
        """Return the number of token ids in every shard but the last."""
        return -(-total // self.size)

    # --- all ranks together; each raises GroupError when one of them is lost ------------------------------------------

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up tensor over all ranks, in place, and return it."""
        if self._group is not None:
            _carry_out(self._group.allreduce, [tensor])
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Give every rank what rank 0 has in tensor, in place, and return it."""
        if self._group is not None:
            _carry_out(self._group.broadcast, [tensor])
        return tensor

    def least(self, number: int, device: torch.device) -> int:
        """Return the least of the ranks' numbers."""
        if self._group is None:
            return number
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        tensor = torch.tensor([number], device=device)
        _carry_out(self._group.allreduce, [tensor], options)
        return int(tensor)

    def is_same(self, number: int, device: torch.device) -> bool:
        """Return whether every rank gave the same number: on all ranks the same answer."""
        return self.least(number, device) == -self.least(-number, device)

    def gather_to_leader(self, tensor: Tensor, dim: int = -1) -> Tensor | None:
        """Return the ranks' tensors, all of one shape, joined along dim on rank 0, and None on the others."""
        if self._group is None:
            return tensor
        tensor = tensor.contiguous()
        is_leader = self.rank == 0
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if is_leader else []
        options = dist.GatherOptions()
        options.rootRank = 0
        _carry_out(self._group.gather, [parts] if is_leader else [], [tensor], options)
        return torch.cat(parts, dim=dim) if is_leader else None


def _carry_out(collective: Callable[..., dist.Work], *arguments: object) -> None:
    """Take part in a collective, and wait for its end."""
    try:
        collective(*arguments).wait()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise GroupError(f"this group's ranks cannot go on together; one of them may be lost: {error}") from error
