"""The same data for both sides, from a seed. Standard library only: it runs in both venvs."""

from __future__ import annotations

import random
from dataclasses import dataclass

BLOCK_SIZE = 16
PROMPT_BLOCKS = 512
WORKERS = 64
OTHER_PROMPTS_PER_WORKER = 4
STORED_BLOCKS = 65_536
VOCABULARY = 150_000


@dataclass(frozen=True)
class Workload:
    prompt: list[int]
    """Tokens, PROMPT_BLOCKS blocks."""
    depths: list[list[int]]
    """How many blocks of the prompt each worker holds, in two cases: all; all different."""
    other: list[list[int]]
    """Tokens of prompts that fill the index, OTHER_PROMPTS_PER_WORKER for each worker."""
    stored: list[int]
    """Tokens of STORED_BLOCKS blocks to store."""


def make(seed: int = 1) -> Workload:
    rng = random.Random(seed)

    def tokens(blocks: int) -> list[int]:
        return rng.choices(range(VOCABULARY), k=blocks * BLOCK_SIZE)

    depths = [PROMPT_BLOCKS * (worker + 1) // WORKERS for worker in range(WORKERS)]
    rng.shuffle(depths)
    return Workload(
        prompt=tokens(PROMPT_BLOCKS),
        depths=[[PROMPT_BLOCKS] * WORKERS, depths],
        other=[tokens(PROMPT_BLOCKS) for _ in range(WORKERS * OTHER_PROMPTS_PER_WORKER)],
        stored=tokens(STORED_BLOCKS),
    )
