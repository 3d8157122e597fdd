"""The kernels by themselves, on the shapes of one model. Used by the engine's benchmark.

Every row is the time of one call, how many bytes it must move at least and how many operations it takes. Block tables
are shuffled, and calls rotate among caches, so that the device's own cache does not serve the same data twice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.device_timer import Call, seconds, seconds_of_first
from benchmarks.engine_speed import BLOCK_SIZE, Work
from kernels.backend import Operations
from models.families.hyperparameters import Hyperparameters
from models.rotary import cos_sin


@dataclass(frozen=True)
class Chunks:
    """batch sequences with query_len new tokens each, the last of a context of context_len."""

    batch: int
    query_len: int
    context_len: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.query_len} over {self.context_len}"


@dataclass(frozen=True)
class Timed:
    """One kernel's call. Bytes and operations are the fewest that its result can be had with."""

    seconds: float
    num_bytes: int
    num_flops: int = 0


class KernelSpeed:
    """Times one set of operations, for one model's heads and sizes."""

    def __init__(
        self,
        sizes: Hyperparameters,
        dtype: torch.dtype,
        device: torch.device,
        operations: Operations,
        rotated_bytes: int,
    ) -> None:
        """rotated_bytes: how much data the calls of one measurement rotate among, more than the device's cache."""
        self._sizes = sizes
        self._dtype = dtype
        self._device = device
        self._rotated_bytes = rotated_bytes
        self._operations = operations
        self._scale = sizes.head_dim**-0.5

    def decode_attention(self, work: Work) -> Timed:
        num_bytes = self._kv_bytes(work.batch * work.length)
        lens = self._full(work.batch, work.length)
        q = self._randn(work.batch, self._sizes.num_heads, self._sizes.head_dim)

        def call(k: Tensor, v: Tensor, tables: Tensor) -> Call:
            return lambda: self._operations.attention_decode(q, k, v, tables, lens, self._scale)

        return Timed(self._seconds(call, lambda: self._paged(work.batch, work.length), num_bytes), num_bytes)

    def prefill_attention(self, chunks: Chunks) -> Timed:
        new, context = chunks.query_len, chunks.context_len
        num_bytes = self._kv_bytes(chunks.batch * context)
        lens = self._full(chunks.batch, context)
        starts = torch.arange(chunks.batch + 1, dtype=torch.int32, device=self._device) * new
        q = self._randn(chunks.batch * new, self._sizes.num_heads, self._sizes.head_dim)

        def call(k: Tensor, v: Tensor, tables: Tensor) -> Call:
            return lambda: self._operations.attention_prefill(q, k, v, tables, starts, lens, self._scale)

        elapsed = self._seconds(call, lambda: self._paged(chunks.batch, context), num_bytes)
        return Timed(elapsed, num_bytes, self._attention_flops(chunks))

    def library_attention(self, chunks: Chunks) -> Timed:
        """The same by torch's scaled_dot_product_attention, cuDNN's on a GPU, for chunks that are whole contexts.

        Keys and values are as the layer's product leaves them: not paged, and not yet in the cache.
        """
        num_bytes = self._kv_bytes(chunks.batch * chunks.context_len)
        elapsed = self._seconds(self._by_library, lambda: self._whole_contexts(chunks), num_bytes)
        return Timed(elapsed, num_bytes, self._attention_flops(chunks))

    def library_first_call(self, chunks: Chunks) -> Timed:
        """What the library's first call takes for a length that it has not seen: cuDNN makes a plan for every one."""
        shorter = Chunks(chunks.batch, chunks.query_len - 1, chunks.context_len - 1)
        call = self._by_library(*self._whole_contexts(shorter))
        return Timed(seconds_of_first(call, self._device), self._kv_bytes(chunks.batch * shorter.context_len))

    def _by_library(self, *qkv: Tensor) -> Call:
        backend = SDPBackend.CUDNN_ATTENTION if self._device.type == "cuda" else SDPBackend.FLASH_ATTENTION

        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*qkv, is_causal=True, scale=self._scale, enable_gqa=True)

        return attend

    def _whole_contexts(self, chunks: Chunks) -> list[Tensor]:
        """Return queries, keys and values of chunks without a prefix."""
        assert chunks.query_len == chunks.context_len
        heads = (self._sizes.num_heads, self._sizes.num_kv_heads, self._sizes.num_kv_heads)
        shapes = [(chunks.batch, chunks.context_len, num, self._sizes.head_dim) for num in heads]
        return [self._randn(*shape).transpose(1, 2) for shape in shapes]

    def _attention_flops(self, chunks: Chunks) -> int:
        """Two for every pair of positions, head and dimension, in each of two products."""
        new, context = chunks.query_len, chunks.context_len
        num_pairs = chunks.batch * (new * (context - new) + new * (new + 1) // 2)
        return 4 * num_pairs * self._sizes.num_heads * self._sizes.head_dim

    def add_rms_norm(self, num_tokens: int) -> Timed:
        size, weight = self._sizes.hidden_size, self._randn(self._sizes.hidden_size)

        def call(x: Tensor, residual: Tensor) -> Call:
            return lambda: self._operations.add_rms_norm(x, residual, weight, 1e-5)

        num_bytes = 4 * num_tokens * size * self._dtype.itemsize
        make = lambda: (self._randn(num_tokens, size), self._randn(num_tokens, size))  # noqa: E731
        return Timed(self._seconds(call, make, num_bytes), num_bytes)

    def silu_mul(self, num_tokens: int) -> Timed:
        size = self._sizes.intermediate_size

        def call(gate_up: Tensor) -> Call:
            return lambda: self._operations.silu_mul(gate_up)

        num_bytes = 3 * num_tokens * size * self._dtype.itemsize
        return Timed(self._seconds(call, lambda: (self._randn(num_tokens, 2 * size),), num_bytes), num_bytes)

    def rope_and_write_kv(self, num_tokens: int) -> Timed:
        sizes = self._sizes
        heads = [sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads]
        frequencies = torch.rand(sizes.head_dim // 2, device=self._device)
        angles = cos_sin(frequencies, torch.arange(num_tokens, device=self._device))

        def call(k_cache: Tensor, v_cache: Tensor, tables: Tensor, qkv: Tensor) -> Call:
            slots = self._slots(tables[0], num_tokens)
            q, k, v = qkv.split(heads, dim=1)
            return lambda: self._operations.rope_and_write_kv(q, k, v, *angles, slots, k_cache, v_cache)

        def make() -> tuple[Tensor, ...]:
            return *self._paged(1, num_tokens), self._randn(num_tokens, sum(heads), sizes.head_dim)

        num_bytes = 2 * num_tokens * sum(heads) * sizes.head_dim * self._dtype.itemsize
        return Timed(self._seconds(call, make, num_bytes), num_bytes)

    def gather_kv(self, num_tokens: int) -> Timed:
        return self._copy(
            num_tokens, lambda planes, table, area, payload: self._operations.gather_kv(planes, table, *area)
        )

    def scatter_kv(self, num_tokens: int) -> Timed:
        def scatter(planes: list[Tensor], table: Tensor, area: tuple[Any, ...], payload: Tensor) -> None:
            self._operations.scatter_kv(payload, planes, table, *area)

        return self._copy(num_tokens, scatter)

    def _copy(self, num_tokens: int, copy: Callable[..., object]) -> Timed:
        """All layers and heads of one prompt, read once and written once."""
        sizes, num_blocks = self._sizes, -(-num_tokens // BLOCK_SIZE)
        area = (0, sizes.num_layers), [(0, sizes.num_kv_heads)] * 2, (0, num_tokens)
        shape = (sizes.num_layers, num_blocks, sizes.num_kv_heads, BLOCK_SIZE, sizes.head_dim)
        payload = self._randn(2, sizes.num_layers, sizes.num_kv_heads, num_tokens, sizes.head_dim)

        def call(keys: Tensor, values: Tensor, table: Tensor) -> Call:
            return lambda: copy([keys, values], table, area, payload)

        def make() -> tuple[Tensor, Tensor, Tensor]:
            return self._randn(*shape), self._randn(*shape), torch.randperm(num_blocks, device=self._device)

        num_bytes = 2 * payload.numel() * self._dtype.itemsize
        return Timed(self._seconds(call, make, num_bytes), num_bytes)

    def _seconds(self, call: Callable[..., Call], make: Callable[[], Iterable[Tensor]], num_bytes: int) -> float:
        """Time call over as many copies of its data as make the device forget the first before it comes again."""
        num_copies = max(2, min(8, self._rotated_bytes // num_bytes + 1))
        return seconds([call(*make()) for _ in range(num_copies)], self._device)

    def _paged(self, batch: int, context_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and block tables."""
        num_blocks = -(-context_len // BLOCK_SIZE)
        shape = (batch * num_blocks, self._sizes.num_kv_heads, BLOCK_SIZE, self._sizes.head_dim)
        tables = torch.randperm(batch * num_blocks, device=self._device).int().view(batch, num_blocks)
        return self._randn(*shape), self._randn(*shape), tables

    @staticmethod
    def _slots(table: Tensor, num_tokens: int) -> Tensor:
        places = torch.arange(BLOCK_SIZE, device=table.device)
        return (table.long()[:, None] * BLOCK_SIZE + places).flatten()[:num_tokens].contiguous()

    def _kv_bytes(self, num_tokens: int) -> int:
        """Keys and values of one layer."""
        return 2 * num_tokens * self._sizes.num_kv_heads * self._sizes.head_dim * self._dtype.itemsize

    def _full(self, num: int, value: int) -> Tensor:
        return torch.full((num,), value, dtype=torch.int32, device=self._device)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype)
