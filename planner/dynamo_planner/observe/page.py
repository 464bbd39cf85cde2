"""A worker's metrics page as figures: vLLM's names, and our launcher's where it stands before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo_runtime.metrics_page import LABEL, samples

from dynamo_planner.observe.reading import COUNTERS, Counters, Number, known

_CACHE_CONFIG = "vllm:cache_config_info"
RUNNING = "vllm:num_requests_running"
_USAGE = "vllm:kv_cache_usage_perc"
_QUEUED = "dynamo_worker_active_prefill_tokens"

# Sample -> figure. Data-parallel ranks are summed; of the cache's use it is the mean.
_GAUGES: Mapping[str, str] = {
    RUNNING: "running",
    "vllm:num_requests_waiting": "waiting",
    _USAGE: "kv_usage",
    _QUEUED: "queued_tokens",
}
_COUNTERS: Mapping[str, str] = {
    "vllm:time_to_first_token_seconds_count": "first_tokens",
    "vllm:time_to_first_token_seconds_sum": "ttft_seconds",
    "vllm:inter_token_latency_seconds_sum": "itl_seconds",
    "vllm:inter_token_latency_seconds_count": "itl_tokens",
    "vllm:e2e_request_latency_seconds_count": "finished",
    "vllm:e2e_request_latency_seconds_sum": "finished_seconds",
    "vllm:request_prompt_tokens_sum": "prompt_tokens",
    "vllm:request_generation_tokens_sum": "output_tokens",
    "vllm:request_prefill_kv_computed_tokens_sum": "prefill_tokens",
    "vllm:request_prefill_time_seconds_sum": "prefill_seconds",
}


@dataclass(frozen=True, slots=True)
class Figures:
    """What a page says; the fields are those of `Reading`."""

    running: Number = None
    waiting: Number = None
    kv_usage: Number = None
    kv_tokens: Number = None
    queued_tokens: Number = None
    counters: Counters = field(default_factory=Counters)


NAMES = (*_GAUGES, *_COUNTERS, _CACHE_CONFIG)
"""Samples that are read."""


def figures(page: str) -> Figures | None:
    """The figures in ``page``; None if it holds no load of an engine, or can't be read."""
    try:
        found = [
            (name, dict(LABEL.findall(labels)) if name == _CACHE_CONFIG else {}, value)
            for name, labels, value in samples(page, NAMES)
        ]
    except (ValueError, IndexError):
        return None
    return figures_of(found)


def figures_of(found: Iterable[tuple[str, Mapping[str, str], float]]) -> Figures | None:
    """The figures in samples ``(name, labels, value)`` of one worker; None if they tell no load."""
    sums: dict[str, float] = {}
    usages = 0
    kv_tokens: float | None = None
    for name, labels, value in found:
        if name == _CACHE_CONFIG:
            size = _cache_tokens(labels)
            kv_tokens = size if kv_tokens is None else kv_tokens + (size or 0.0)
            continue
        figure = _GAUGES.get(name) or _COUNTERS[name]
        usages += name == _USAGE
        # NaN poisons its sum, which is then unknown: better than a sum of some ranks.
        sums[figure] = sums.get(figure, 0.0) + value
    if "running" not in sums:
        return None
    gauges: dict[str, Any] = {name: known(sums[name]) for name in _GAUGES.values() if name in sums}
    if usages and gauges["kv_usage"] is not None:
        gauges["kv_usage"] /= usages
    counters = Counters(**{name: known(sums[name]) for name in COUNTERS if name in sums})
    return Figures(**gauges, kv_tokens=known(kv_tokens), counters=counters)


def _cache_tokens(labels: Mapping[str, str]) -> float | None:
    """Tokens of one rank's cache, from vLLM's settings; older versions give blocks only."""
    for product in (("kv_cache_size_tokens",), ("num_gpu_blocks", "block_size")):
        values = [labels.get(name, "") for name in product]
        if all(value.isdecimal() for value in values):
            size = 1.0
            for value in values:
                size *= int(value)
            return size
    return None
