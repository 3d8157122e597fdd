"""Blocks of a paged KV cache -> one contiguous payload, all planes, heads and token positions in one launch.

Called by kv_transfer on the sending side. A slot of one head of one plane is the unit that is copied, so partial blocks
and slices of heads need no case of their own. Slots are copied as 32-bit words, whatever their type.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, int32

from kernels.plain.gather_kv import Range, new_payload
from kernels.triton.configurations import KV_COPY, padded


def gather_kv(
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
    out: Tensor | None = None,
) -> Tensor:
    """Copy ranges of layers, local heads and token positions out of the cache; as kernels/plain/gather_kv.py.

    Slots and payload have whole words, and out begins at one.
    """
    payload = new_payload(planes, layers, heads, tokens) if out is None else out
    launch_copy(_gather_kv, payload, planes, block_table, layers, heads, tokens)
    return payload


def launch_copy(
    kernel: triton.JITFunction,
    payload: Tensor,
    planes: Sequence[Tensor],
    block_table: Tensor,
    layers: Range,
    heads: Sequence[Range],
    tokens: Range,
) -> None:
    """Run kernel, which copies one way or the other, over all slots of the ranges."""
    assert all(plane.is_contiguous() for plane in planes)
    assert payload.is_contiguous()
    words = tuple(plane.view(int32) for plane in planes)
    tiles = tuple(padded(plane.shape[-1], least=min(KV_COPY)) for plane in words)
    config = KV_COPY[max(tiles)]
    num_layers, num_tokens = layers[1] - layers[0], tokens[1] - tokens[0]
    num_rows = num_layers * sum(stop - first for first, stop in heads)
    kernel[num_rows, triton.cdiv(num_tokens, config.rows)](
        payload.view(int32),
        words,
        block_table,
        tuple(_unspecial(first) for first, _ in heads),
        tuple(_unspecial(stop - first) for first, stop in heads),
        layers[0],
        num_layers,
        tokens[0],
        num_tokens,
        words[0].shape[1],
        NUM_CACHE_HEADS=tuple(plane.shape[2] for plane in words),
        BLOCK_SIZE=words[0].shape[3],
        SLOT_WORDS=tuple(plane.shape[4] for plane in words),
        TILES=tiles,
        TOKENS=config.rows,
        **config.launch,
    )


def _unspecial(number: int) -> int:
    """Return what number() makes number of again.

    Triton compiles a kernel anew for every 1 and every multiple of 16 within a tuple, whatever it is told.
    """
    return number << 4 | 8


@triton.jit
def number(unspecial):
    """Return what a number of a tuple of arguments was."""
    return unspecial >> 4


@triton.jit
def slot_offsets(
    row,  # of this plane: (layer, head)
    block_table,  # int64 [num_blocks of the prompt]
    first_head,
    num_heads,
    first_layer,
    first_token,
    num_tokens,
    num_blocks,
    NUM_CACHE_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return this program's offsets in its plane's payload and cache, and which count: [TOKENS, TILE] each."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    words = tl.arange(0, TILE)
    is_token = token < num_tokens
    position = first_token + token
    block_id = tl.load(block_table + position // BLOCK_SIZE, mask=is_token, other=0)  # [TOKENS]
    block = (first_layer + row // num_heads).to(tl.int64) * num_blocks + block_id  # of all layers' blocks
    slot = (block * NUM_CACHE_HEADS + first_head + row % num_heads) * BLOCK_SIZE + position % BLOCK_SIZE
    in_payload = (row.to(tl.int64) * num_tokens + token)[:, None] * SLOT_WORDS + words[None, :]
    return in_payload, slot[:, None] * SLOT_WORDS + words[None, :], is_token[:, None] & (words < SLOT_WORDS)[None, :]


@triton.jit(
    do_not_specialize=["first_layer", "num_layers", "first_token", "num_tokens", "num_blocks"],
    do_not_specialize_on_alignment=["block_table"],
)
def _gather_kv(
    payload,  # int32, plane after plane: [num_layers, num_heads of the plane, num_tokens, SLOT_WORDS]
    planes,  # int32, each [all layers, num_blocks, NUM_CACHE_HEADS, BLOCK_SIZE, SLOT_WORDS]
    block_table,  # int64 [num_blocks of the prompt]
    first_heads,  # of each plane: see number()
    num_heads,  # likewise
    first_layer,
    num_layers,
    first_token,
    num_tokens,
    num_blocks,
    NUM_CACHE_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0)
    for index in tl.static_range(len(planes)):
        plane_heads = number(num_heads[index])
        num_rows = num_layers * plane_heads
        if (row >= 0) & (row < num_rows):
            in_payload, in_cache, mask = slot_offsets(
                row,
                block_table,
                number(first_heads[index]),
                plane_heads,
                first_layer,
                first_token,
                num_tokens,
                num_blocks,
                NUM_CACHE_HEADS[index],
                BLOCK_SIZE,
                SLOT_WORDS[index],
                TILES[index],
                TOKENS,
            )
            tl.store(payload + in_payload, tl.load(planes[index] + in_cache, mask=mask), mask=mask)
        row -= num_rows
        payload += num_rows.to(tl.int64) * num_tokens * SLOT_WORDS[index]
