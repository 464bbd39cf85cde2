"""Read the few figures we need out of an engine's Prometheus page.

A full parser costs milliseconds on vLLM's thousands of lines, once a second and for each worker;
the lines of interest begin with known names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE_USAGE = "vllm:kv_cache_usage_perc"
FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
CACHE_CONFIG = "vllm:cache_config_info"

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What the engine's metrics say, summed over its data-parallel ranks."""

    running: int  # requests in the running batch
    waiting: int  # requests in the engine's queue
    cache_usage: float  # 0..1, mean over ranks
    first_tokens: float  # requests that have got their first token since the engine started


def samples(page: str, names: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """(name, label text, value) of each sample of ``names``."""
    wanted = set(names)
    for line in page.splitlines():
        if line.startswith("#"):
            continue
        head, _, value = line.rpartition(" ")
        name, _, labels = head.partition("{")
        if name in wanted:
            yield name, labels.removesuffix("}"), float(value)


def figures(page: str) -> EngineFigures | None:
    """The load in ``page``; ``None`` if it has none (``--disable-log-stats``, another engine)."""
    sums = dict.fromkeys((RUNNING, WAITING, CACHE_USAGE, FIRST_TOKENS), 0.0)
    ranks = 0
    for name, _, value in samples(page, sums):
        sums[name] += value
        ranks += name == RUNNING
    if not ranks:
        return None
    return EngineFigures(
        running=int(sums[RUNNING]),
        waiting=int(sums[WAITING]),
        cache_usage=sums[CACHE_USAGE] / ranks,
        first_tokens=sums[FIRST_TOKENS],
    )


def cache_config(page: str) -> dict[str, str]:
    """The labels of ``vllm:cache_config_info``: ``block_size``, ``num_gpu_blocks``, …"""
    for _, labels, _ in samples(page, (CACHE_CONFIG,)):
        return dict(_LABEL.findall(labels))
    return {}
