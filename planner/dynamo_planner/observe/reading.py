"""What one worker tells, as it came: figures may be missing, and no number is trusted yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

Number = float | None
"""A figure; None, NaN, infinite and negative ones all mean: not known."""


def known(value: Number) -> float | None:
    """``value`` where it is one that a count, a share or a time can have."""
    return value if value is not None and math.isfinite(value) and value >= 0 else None


@dataclass(frozen=True, slots=True)
class Counters:
    """Figures that only grow, until the engine restarts."""

    first_tokens: Number = None  # requests that have got their first token
    ttft_seconds: Number = None  # their times to it, summed
    itl_seconds: Number = None  # times between two tokens, summed
    itl_tokens: Number = None  # how many such times
    finished: Number = None  # requests that ended by themselves
    finished_seconds: Number = None  # their times from arrival to end, summed
    prompt_tokens: Number = None  # their prompts' tokens, summed
    output_tokens: Number = None  # their answers' tokens, summed
    prefill_tokens: Number = None  # prompt tokens computed for them: not those found cached
    prefill_seconds: Number = None  # their times in prefill, summed


COUNTERS = tuple(field.name for field in fields(Counters))


@dataclass(frozen=True, slots=True)
class Reading:
    """One worker, as it was ``age_s`` seconds ago."""

    worker: str  # pod
    component: str
    ready: bool = True  # may get requests, as its probes say
    terminating: bool = False
    age_s: float | None = None  # of the figures below; None: it never gave any
    running: Number = None  # requests in the batch
    waiting: Number = None  # requests in the engine's queue
    kv_usage: Number = None  # share of the KV cache in use, 0..1
    kv_tokens: Number = None  # tokens that the KV cache holds
    queued_tokens: Number = None  # prompt tokens still to be computed, where the worker tells
    context_tokens: Number = None  # longest prompt and answer together
    counters: Counters = field(default_factory=Counters)
