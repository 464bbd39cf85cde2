"""What is asked of an engine to learn its times, and how the answers are read.

Prefill: one prompt alone in the engine, from sending it to its first token. Prompts are random
tokens, so that no cache holds them. Decode: as many answers at once as the batch has, timed only
while all of them run; what the first ones waited for the last ones' prompts is left out.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol

LEAST_TOKENS = 8
"""Tokens of each answer that must fall into the time in which all answers run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer, in seconds of one clock."""

    sent: float
    arrived: Sequence[float]  # of its chunks, the first token's first
    tokens: int  # in all of them

    @property
    def first_s(self) -> float:
        return self.arrived[0] - self.sent


class Asked(Protocol):
    """The engine."""

    async def answer(self, prompt: Sequence[int], tokens: int) -> Answer:
        """Exactly ``tokens`` tokens after a prompt of token ids, streamed."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    prompts: Sequence[int] = (128, 512, 1024, 2048, 4096)  # lengths, tokens
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)
    repeats: int = 3  # of each prompt length; the median counts
    context: int = 256  # tokens of prompt in a batch
    answer: int = 96  # tokens of each answer in a batch
    vocabulary: tuple[int, int] = (100, 2_000)  # token ids that prompts are drawn from
    seed: int = 0  # of the prompts


@dataclass(frozen=True, slots=True)
class Measured:
    """One point, or why there is none."""

    kind: Literal["prefill", "decode"]
    size: int  # tokens of the prompt, or the batch
    seconds: float | None
    note: str = ""


async def measure(engine: Asked, plan: Plan) -> AsyncIterator[Measured]:
    """The points of ``plan``, each as soon as it is known. Batches end with the first that the
    engine does not run at once."""
    rng = random.Random(plan.seed)
    low, high = plan.vocabulary

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(low, high) for _ in range(tokens)]

    await engine.answer(prompt(plan.context), 2)  # the first request of an engine is slow
    for tokens in plan.prompts:
        found = [(await engine.answer(prompt(tokens), 1)).first_s for _ in range(plan.repeats)]
        yield Measured("prefill", tokens, median(found))
    for batch in plan.batches:
        answers = await asyncio.gather(
            *(engine.answer(prompt(plan.context), plan.answer) for _ in range(batch))
        )
        seconds = step_seconds(answers)
        if seconds is None:
            why = f"the engine does not run {batch} answers at once for long enough"
            yield Measured("decode", batch, None, why)
            return
        yield Measured("decode", batch, seconds)


def step_seconds(answers: Sequence[Answer]) -> float | None:
    """Seconds for one token of each of ``answers`` while all of them ran; None if that was short.

    Servers may send several tokens in a chunk: chunks count as many tokens as they do on average.
    """
    begin = max(answer.arrived[0] for answer in answers)
    end = min(answer.arrived[-1] for answer in answers)
    steps = []
    for answer in answers:
        within = [at for at in answer.arrived if begin <= at <= end]
        each = (answer.tokens - 1) / max(1, len(answer.arrived) - 1)
        tokens = (len(within) - 1) * each
        if tokens < LEAST_TOKENS:
            return None
        steps.append((within[-1] - within[0]) / tokens)
    return sum(steps) / len(steps)
