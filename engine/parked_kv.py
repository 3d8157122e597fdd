"""KV of sequences that had to make way: one rank's copies in host memory, taken and put back by the leader's orders.

Every rank of a group holds its own heads. The leader decides which sequences are parked, and how many; nothing ever
leaves the rank. Copies are made where steps are, on the device's current stream: after every step that was launched
before the order, and before all that are launched after it. The host waits for them: their memory is not pinned.
Elsewhere this is called swapping KV out and in, when a sequence is preempted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import operations_for
from kernels.plain.gather_kv import parts_of
from kernels.upload import upload
from protocol.identity import Attempt
from protocol.orders import Discard, Park, Unpark


@dataclass(frozen=True, slots=True)
class ParkedCopy:
    """KV of one sequence in host memory. layers: what gather_kv returns, layer by layer."""

    num_tokens: int
    layers: list[Tensor]


class ParkedKV:
    """planes: of the cache, each [num_layers, num_blocks, num_local_heads, block_size, dim]."""

    def __init__(self, planes: Sequence[Tensor]) -> None:
        self._planes = planes
        self._device = planes[0].device
        self._heads = [(0, plane.shape[2]) for plane in planes]
        self._operations = operations_for(self._device)
        self._parked: dict[Attempt, ParkedCopy] = {}
        self._compile()

    def __len__(self) -> int:
        return len(self._parked)

    def execute(self, order: Park | Unpark | Discard) -> None:
        """Carry out one order. Its place among the steps decides what is copied, and what may be overwritten."""
        match order:
            case Park():
                self._park(order)
            case Unpark():
                self._unpark(order, self._parked.pop(order.attempt))
            case Discard():
                del self._parked[order.attempt]

    def _compile(self) -> None:
        """Run both operations once, so that no sequence waits for one to be compiled; block 0 is left as it is."""
        area = self._table((0,)), (0, 1), self._heads, (0, 1)
        self._operations.scatter_kv(self._operations.gather_kv(self._planes, *area), self._planes, *area)

    def _park(self, order: Park) -> None:
        assert order.attempt not in self._parked, "a sequence is parked once"
        table, layers = self._table(order.block_ids), []
        for layer in range(len(self._planes[0])):  # one by one, so that little memory is taken on the device
            area = table, (layer, layer + 1), self._heads, (0, order.num_tokens)
            layers.append(self._operations.gather_kv(self._planes, *area).cpu())
        self._parked[order.attempt] = ParkedCopy(order.num_tokens, layers)

    def _unpark(self, order: Unpark, copy: ParkedCopy) -> None:
        table, tokens = self._table(order.block_ids), (order.first_position, copy.num_tokens)
        if order.first_position == copy.num_tokens:
            return
        for layer, payload in enumerate(copy.layers):
            rest = self._rest_of(payload, copy.num_tokens, order.first_position).to(self._device)
            self._operations.scatter_kv(rest, self._planes, table, (layer, layer + 1), self._heads, tokens)

    def _rest_of(self, payload: Tensor, num_tokens: int, first_position: int) -> Tensor:
        """Return what the payload of one layer holds of the tokens from first_position on."""
        if first_position == 0:
            return payload
        parts = parts_of(payload, self._planes, (0, 1), self._heads, (0, num_tokens))
        return torch.cat([part[:, :, first_position:].flatten() for part in parts])

    def _table(self, block_ids: tuple[int, ...]) -> Tensor:
        [table] = upload([torch.tensor(block_ids, dtype=torch.int64)], self._device)
        return table
