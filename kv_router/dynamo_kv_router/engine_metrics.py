"""Read the few figures we need out of an engine's Prometheus page.

Names are those of the model server protocol of the Gateway API Inference Extension (its proposal
003), for each engine that it names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from dynamo_runtime.metrics_page import LABEL, samples

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE_USAGE = "vllm:kv_cache_usage_perc"
FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
CACHE_CONFIG = "vllm:cache_config_info"
LORAS = "vllm:lora_requests_info"

# Sample name -> (figure, a label that the sample must have or "").
_FIGURES: dict[str, tuple[tuple[str, str], ...]] = {
    RUNNING: (("running", ""),),
    WAITING: (("waiting", ""),),
    CACHE_USAGE: (("cache_usage", ""),),
    FIRST_TOKENS: (("first_tokens", ""),),
    "sglang:num_running_reqs": (("running", ""),),
    "sglang:num_queue_reqs": (("waiting", ""),),
    "sglang:token_usage": (("cache_usage", ""),),
    "sglang:time_to_first_token_seconds_count": (("first_tokens", ""),),
    "trtllm_num_requests_running": (("running", ""),),
    "trtllm_num_requests_waiting": (("waiting", ""),),
    "trtllm_kv_cache_utilization": (("cache_usage", ""),),
    # TensorRT-LLM behind Triton has one name for several figures.
    "nv_trt_llm_request_metrics": (
        ("running", 'request_type="scheduled"'),
        ("waiting", 'request_type="waiting"'),
    ),
    "nv_trt_llm_kv_cache_block_metrics": (("cache_usage", 'kv_cache_block_type="fraction"'),),
}

_RANK = re.compile(r'engine="(\d+)"')  # vLLM's label of every series


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What the engine's metrics say, summed over its data-parallel ranks."""

    running: int  # requests in the running batch
    waiting: int  # requests in the engine's queue
    cache_usage: float  # 0..1, mean over ranks
    first_tokens: float  # requests that have got their first token since the engine started
    loras_running: frozenset[str] = frozenset()  # adapters of the requests in the batch
    loras_waiting: frozenset[str] = frozenset()  # adapters of the requests in the queue
    max_loras: int = 0  # adapters that fit into a batch; 0: the engine does not say
    by_rank: Mapping[int, int] = field(default_factory=dict)  # rank -> requests running or waiting


def figures(page: str) -> EngineFigures | None:
    """The load in ``page``; ``None`` if it has none (``--disable-log-stats``, another engine)."""
    sums = dict.fromkeys(("running", "waiting", "cache_usage", "first_tokens"), 0.0)
    ranks = usages = 0
    by_rank: Counter[int] = Counter()
    newest, lora_labels = 0.0, ""
    for name, labels, value in samples(page, (*_FIGURES, LORAS)):
        if name == LORAS:
            # One series for each set of adapters there has been; its value is when that was.
            if value >= newest:
                newest, lora_labels = value, labels
            continue
        if name in (RUNNING, WAITING) and (rank := _RANK.search(labels)):
            by_rank[int(rank[1])] += int(value)
        for figure, label in _FIGURES[name]:
            if label in labels:
                sums[figure] += value
                ranks += figure == "running"
                usages += figure == "cache_usage"
    if not ranks:
        return None
    lora = dict(LABEL.findall(lora_labels))
    most = lora.get("max_lora", "")
    return EngineFigures(
        running=int(sums["running"]),
        waiting=int(sums["waiting"]),
        cache_usage=sums["cache_usage"] / (usages or 1),
        first_tokens=sums["first_tokens"],
        loras_running=_names(lora.get("running_lora_adapters", "")),
        loras_waiting=_names(lora.get("waiting_lora_adapters", "")),
        max_loras=int(most) if most.isdecimal() else 0,
        by_rank=by_rank,
    )


def _names(csv: str) -> frozenset[str]:
    return frozenset(name for name in map(str.strip, csv.split(",")) if name)


def cache_config(page: str) -> dict[str, str]:
    """The labels of ``vllm:cache_config_info``: ``block_size``, ``num_gpu_blocks``, …"""
    for _, labels, _ in samples(page, (CACHE_CONFIG,)):
        return dict(LABEL.findall(labels))
    return {}
