"""Tile shapes, warps and pipeline stages of every kernel, by the shape of its operands. Read by the kernels' callers.

Declared, never autotuned: autotuning would make requests wait for compilations and let two workers differ. Each entry
also declares how many bytes of registers it may spill; a test compiles all of them for every chip below. Sizes count
elements; shapes are padded to powers of two, the only ones that Triton has.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_SHARED_BYTES = {80: 101_376, 90: 232_448}
"""Chip, named by its compute capability -> shared memory of one program: the least that any 8.x has (A100 has more),
and Hopper's."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """How one kernel cuts its work: rows x tile elements at a time in each program."""

    tile: int
    rows: int = 1
    num_warps: int = 4
    num_stages: int = 2
    fuse_multiply_add: bool = True  # off where every rounding must be that of plain torch
    max_spill_bytes: int = 0  # per thread

    @property
    def launch(self) -> dict[str, int | bool]:
        """The part that Triton reads itself."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fuse_multiply_add,
        }


# (bytes per element, padded head_dim) -> rows: query heads packed for one KV head, tile: positions per step.
# 16 rows are the least that tensor cores take. Keys and values are found through a block table, which has to be on its
# way before they can be: that takes half of the pipeline, so 5 stages hold two tiles of both in shared memory. At
# head_dim 128 that is 64 KB in each of the programs that share a multiprocessor, several times what an H200 needs in
# flight (4.2 TB/s times 1 us over 132 multiprocessors).
ATTENTION_DECODE = {
    (2, 64): Configuration(rows=16, tile=128, num_warps=4, num_stages=5),
    (2, 128): Configuration(rows=16, tile=64, num_warps=4, num_stages=5, max_spill_bytes=8),  # Triton 3.6, head_dim 80
    (2, 256): Configuration(rows=16, tile=32, num_warps=4, num_stages=5),
    (4, 64): Configuration(rows=16, tile=32, num_warps=4, num_stages=3),
    (4, 128): Configuration(rows=16, tile=32, num_warps=8, num_stages=3),
    (4, 256): Configuration(rows=16, tile=16, num_warps=8, num_stages=3),
}
PROGRAMS_PER_MULTIPROCESSOR = 2

# (chip, bytes per element, padded head_dim) -> rows: query heads x tokens, tile: positions per step. Hopper's matrix
# units read one operand from shared memory, which takes longer than the product itself unless tiles are wide. Float32
# has no tensor cores that keep its precision, so its tiles are what registers can hold. The spills are what Triton 3.6
# and 3.9 give at worst, for 4 or 7 query heads that share a KV head.
ATTENTION_PREFILL = {
    (90, 2, 64): Configuration(rows=128, tile=64, num_warps=8, num_stages=5),
    (90, 2, 128): Configuration(rows=128, tile=128, num_warps=8, num_stages=3, max_spill_bytes=16),
    (90, 2, 256): Configuration(rows=128, tile=32, num_warps=8, num_stages=5),
    (80, 2, 64): Configuration(rows=128, tile=64, num_warps=8, num_stages=5),
    (80, 2, 128): Configuration(rows=128, tile=64, num_warps=8, num_stages=5, max_spill_bytes=40),
    (80, 2, 256): Configuration(rows=64, tile=32, num_warps=8, num_stages=3),
    **{(chip, 4, 64): Configuration(rows=32, tile=32, num_warps=8, num_stages=2) for chip in (80, 90)},
    **{(chip, 4, 128): Configuration(rows=16, tile=16, num_warps=4, num_stages=2) for chip in (80, 90)},
    **{(chip, 4, 256): Configuration(rows=32, tile=16, num_warps=8, num_stages=3) for chip in (80, 90)},
}
ATTENTION_PLAN = Configuration(rows=32, tile=32)  # tiles of one sequence x sequences compared with
SPLIT_MERGE = Configuration(tile=16)  # partial results per step

# padded row length -> rows: rows per program, tile: the whole row, since its mean must be known before it is written.
RMS_NORM = {
    64: Configuration(rows=16, tile=64),
    128: Configuration(rows=8, tile=128),
    256: Configuration(rows=4, tile=256),
    512: Configuration(rows=2, tile=512),
    1024: Configuration(tile=1024),
    2048: Configuration(tile=2048),
    4096: Configuration(tile=4096, num_warps=8),
    8192: Configuration(tile=8192, num_warps=8),
    16384: Configuration(tile=16384, num_warps=16),
}

# padded head_dim -> rows: heads per program; a program turns one token's.
ROPE = {
    64: Configuration(rows=32, tile=64),
    128: Configuration(rows=16, tile=128),
    256: Configuration(rows=8, tile=256),
}

# padded 32-bit words of a slot, of the widest plane -> rows: tokens per program.
KV_COPY = {
    32: Configuration(rows=64, tile=32),
    64: Configuration(rows=32, tile=64),
    128: Configuration(rows=16, tile=128),
    256: Configuration(rows=8, tile=256),
    512: Configuration(rows=4, tile=512),
    1024: Configuration(rows=2, tile=1024),
}

DIGEST = Configuration(rows=4, tile=512)  # units x words per step
SILU_MUL = Configuration(tile=1024)
PENALIZE = Configuration(tile=1024, fuse_multiply_add=False)
SAMPLE_FILTER_BITS = 3  # of a threshold found per pass over the vocabulary
SAMPLE_FILTER = Configuration(  # thresholds tried x token ids
    rows=1 << SAMPLE_FILTER_BITS, tile=2048, num_warps=16, fuse_multiply_add=False
)
SAMPLE_DRAW = Configuration(tile=2048, fuse_multiply_add=False)


def padded(size: int, least: int = 64) -> int:
    """Return the power of two that the tables above know size by; the copies' table begins at 32."""
    return max(least, 1 << (size - 1).bit_length())


@lru_cache
def chip(device: torch.device) -> int:
    """Return the chip whose configurations suit device: the newest that it can do all of, the newest on a CPU."""
    if device.type != "cuda":
        return max(MAX_SHARED_BYTES)
    found = torch.cuda.get_device_properties(device)
    capability, shared_bytes = 10 * found.major + found.minor, found.shared_memory_per_block_optin
    suiting = [chip for chip, needed in MAX_SHARED_BYTES.items() if chip <= capability and needed <= shared_bytes]
    if not suiting:
        raise ValueError(f"{found.name} has compute capability {found.major}.{found.minor}; kernels need 8.0 or newer")
    return max(suiting)


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side at least; 4 where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


_LONGEST_SPLIT = 4096
_SHORTEST_SPLIT = 512
_MAX_SPLITS = 128
_ENOUGH_USED = 0.9


@lru_cache(maxsize=4096)
def choose_splits(num_rows: int, max_context: int, tile: int, num_programs: int) -> tuple[int, int]:
    """Return (number of splits, positions that a split has at least) of decode attention.

    num_rows: sequences times KV heads; max_context: what the block tables have room for; num_programs: how many run
    at once. All of these are known when a CUDA graph is captured: kernels divide each context on the GPU.

    Takes the fewest splits that keep 0.9 of the GPU used in all waves of programs, or come as close as any. More are
    taken where one long context would otherwise keep a few multiprocessors busy long after the rest of its batch.
    """
    most = min(-(-max_context // tile), _MAX_SPLITS)
    used = [_share_used(num_rows * splits, num_programs) for splits in range(1, most + 1)]
    to_fill = 1 + next(index for index, share in enumerate(used) if share >= min(_ENOUGH_USED, max(used)))
    to_bound = min(-(-max_context // _LONGEST_SPLIT), most)
    return (to_fill, tile) if to_fill >= to_bound else (to_bound, max(tile, _SHORTEST_SPLIT))


def _share_used(num_started: int, num_programs: int) -> float:
    """Return the share of the GPU that is busy when so many equal programs run in waves of num_programs."""
    waves = -(-num_started // num_programs)
    return num_started / (waves * num_programs)
