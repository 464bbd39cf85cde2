"""What scorers share: figures of engines that may be unknown, brought to [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynamo_kv_router.choice import Candidate


def figures(candidates: Sequence[Candidate], read: Callable[[Candidate], float]) -> list[float]:
    """The candidates' figures; unknown ones, and those too old to be believed, count as the worst
    (highest) of the others: such an engine is never preferred, and stays eligible."""
    worst = max((read(each) for each in candidates if each.figures_known), default=0.0)
    return [read(each) if each.figures_known else worst for each in candidates]


def fewest_first(values: Sequence[float]) -> list[float]:
    """``(max − v) / (max − min)``; all 1.0 where they are equal. Source: llm-d's queue-scorer."""
    low, high = min(values), max(values)
    if low == high:
        return [1.0] * len(values)
    return [(high - value) / (high - low) for value in values]
