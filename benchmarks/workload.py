"""What is asked of every system: the same token ids from the same seed, greedy, with no early end.

Three measurements: prefill (8 prompts of 512 tokens, one token each), one stream (128 in, 64 out), and eight streams at
once (256 in, 64 out), as in docs/performance.md.
"""

import random
from dataclasses import dataclass
from typing import Protocol

PROMPT_IDS_BELOW = 500  # every model here has at least that many ordinary tokens


@dataclass(frozen=True)
class Answer:
    """One answer, with the times of its first and last token in seconds from the start of its run."""

    token_ids: list[int]
    first_s: float
    last_s: float


class System(Protocol):
    """Something that generates."""

    name: str

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
        """Answer all prompts at once with num_tokens tokens each."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second."""

    prefill: float
    decode_1: float
    total_8: float


def prompts_of(num: int, length: int, seed: int) -> list[list[int]]:
    """Return num random prompts; another seed gives others, so that no prefix cache helps."""
    generator = random.Random(seed)
    return [[generator.randrange(8, PROMPT_IDS_BELOW) for _ in range(length)] for _ in range(num)]


def measure(system: System, seed: int) -> Rates:
    """Run the three measurements once."""
    prefill = system.generate(prompts_of(8, 512, seed), 1)
    [single] = system.generate(prompts_of(1, 128, seed + 1), 64)
    eight = system.generate(prompts_of(8, 256, seed + 2), 64)
    return Rates(
        prefill=8 * 512 / max(answer.first_s for answer in prefill),
        decode_1=(len(single.token_ids) - 1) / (single.last_s - single.first_s),
        total_8=sum(len(answer.token_ids) for answer in eight) / max(answer.last_s for answer in eight),
    )
