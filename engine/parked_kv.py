"""KV of sequences that had to make way: one rank's copies in host memory, taken and put back by the leader's orders.

Every rank of a group holds its own heads. The leader decides which sequences are parked, and how many; nothing ever
leaves the rank. Copies are made where steps are, on the device's current stream: after every step that was launched
before the order, and before all that are launched after it. The host waits for them: their memory is not pinned.
Elsewhere this is called swapping KV out and in, when a sequence is preempted.
"""

import torch
from torch import Tensor

from kernels.backend import operations_for
from kernels.upload import upload
from protocol.identity import Attempt
from protocol.orders import Discard, Park, Unpark


class ParkedKV:
    """cache: [num_layers, 2, num_blocks, num_local_kv_heads, block_size, head_dim]."""

    def __init__(self, cache: Tensor) -> None:
        self._cache = cache
        self._operations = operations_for(cache.device)
        self._parked: dict[Attempt, Tensor] = {}  # each [num_layers, 2, num_local_kv_heads, num_tokens, head_dim]
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
        area = self._table((0,)), (0, 1), (0, self._cache.shape[3]), (0, 1)
        self._operations.scatter_kv(self._operations.gather_kv(self._cache, *area), self._cache, *area)

    def _park(self, order: Park) -> None:
        assert order.attempt not in self._parked, "a sequence is parked once"
        num_layers, planes, _, num_heads, _, head_dim = self._cache.shape
        shape = (num_layers, planes, num_heads, order.num_tokens, head_dim)
        copy = self._parked[order.attempt] = torch.empty(shape, dtype=self._cache.dtype)
        table, heads, tokens = self._table(order.block_ids), (0, num_heads), (0, order.num_tokens)
        for layer in range(num_layers):  # one by one, so that little memory is taken on the device
            copy[layer : layer + 1] = self._operations.gather_kv(self._cache, table, (layer, layer + 1), heads, tokens)

    def _unpark(self, order: Unpark, copy: Tensor) -> None:
        num_layers, _, num_heads, num_tokens, _ = copy.shape
        table, heads, tokens = self._table(order.block_ids), (0, num_heads), (order.first_position, num_tokens)
        if order.first_position == num_tokens:
            return
        for layer in range(num_layers):
            part = copy[layer : layer + 1, :, :, order.first_position :].contiguous().to(self._cache.device)
            self._operations.scatter_kv(part, self._cache, table, (layer, layer + 1), heads, tokens)

    def _table(self, block_ids: tuple[int, ...]) -> Tensor:
        [table] = upload([torch.tensor(block_ids, dtype=torch.int64)], self._cache.device)
        return table
