"""From measured points to a timing profile; pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dynamo_runtime.timing_profile import DecodePoint, TimingProfile

from dynamo_planner.performance.live import fit

FASTEST = 1e9
"""Tokens a second of an engine whose prompts all take the same time."""


def profile_of(
    prefills: Sequence[tuple[float, float]], steps: Sequence[tuple[int, float]]
) -> TimingProfile:
    """The profile of (prompt tokens, seconds) and (batch, seconds a step), neither empty.

    Prefill is the line of least squares, with neither part negative. A step of a larger batch is
    never faster: where it was measured so, that was noise, and the slower one counts.
    """
    line = fit(prefills)
    if line is None or not steps:
        raise ValueError("a profile needs at least one prompt and one batch")
    ordered = sorted(steps)
    slowest = accumulate((seconds for _, seconds in ordered), max)
    return TimingProfile(
        prefill_tokens_per_s=min(FASTEST, 1 / line.slope) if line.slope > 0 else FASTEST,
        prefill_overhead_s=line.intercept,
        decode=tuple(
            DecodePoint(batch, seconds)
            for (batch, _), seconds in zip(ordered, slowest, strict=True)
        ),
    )
