"""The engine's metrics, under vLLM's names, labels and buckets.

Counted in plain numbers and turned into samples only when somebody scrapes: there is an
observation for every token, and a metrics library's locks would cost more than the simulation.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from dynamo_workers.sim import scheduler as model
from dynamo_workers.sim import transfer

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

# fmt: off
LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
INTER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)
# fmt: on
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
ANSWERS = (1, 2, 5, 10, 20)

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


def one_two_five(highest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, … up to `highest`: the buckets of token counts."""
    bounds = []
    scale = 1
    while scale <= highest:
        bounds += [scale * step for step in (1, 2, 5) if scale * step <= highest]
        scale *= 10
    return tuple(bounds)


class Histogram:
    """Counts by upper bound, the last one infinite."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts as the text format has them."""
        result: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*map(float, self.bounds), None), self.counts, strict=True):
            seen += count
            result.append(("+Inf" if bound is None else str(bound), seen))
        return result


@dataclass(slots=True)
class RequestTimes:
    """One ended sequence, in seconds of the engine's clock and in tokens."""

    reason: str
    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int
    max_tokens: int
    preemptions: int
    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float


@dataclass(slots=True)
class Metrics:
    """What one engine has done since it started."""

    max_model_len: int
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    external_prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN))
    inter_token: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN))
    per_output_token: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
    total: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    queue: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    inference: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    prefill: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    decode: Histogram = field(default_factory=lambda: Histogram(LATENCY))
    preemptions: Histogram = field(default_factory=lambda: Histogram(PREEMPTIONS))
    answers: Histogram = field(default_factory=lambda: Histogram(ANSWERS))
    request_prompt: Histogram = field(init=False)
    request_generation: Histogram = field(init=False)
    request_max_tokens: Histogram = field(init=False)
    request_prefill_computed: Histogram = field(init=False)

    def __post_init__(self) -> None:
        bounds = one_two_five(self.max_model_len)
        self.request_prompt = Histogram(bounds)
        self.request_generation = Histogram(bounds)
        self.request_max_tokens = Histogram(bounds)
        self.request_prefill_computed = Histogram(bounds)

    def record_first_token(
        self, prompt_tokens: int, cached_tokens: int, external_tokens: int, seconds: float
    ) -> None:
        """A prompt is computed, `seconds` after its request arrived."""
        self.prompt_tokens += prompt_tokens
        self.cached_prompt_tokens += cached_tokens
        self.external_prompt_tokens += external_tokens
        self.first_token.observe(seconds)

    def record_finished(self, times: RequestTimes) -> None:
        """A sequence ended by itself."""
        self.finished[times.reason] += 1
        self.total.observe(times.total_s)
        self.queue.observe(times.queue_s)
        self.inference.observe(times.prefill_s + times.decode_s)
        self.prefill.observe(times.prefill_s)
        self.decode.observe(times.decode_s)
        self.preemptions.observe(times.preemptions)
        self.request_prompt.observe(times.prompt_tokens)
        self.request_generation.observe(times.answer_tokens)
        self.request_max_tokens.observe(times.max_tokens)
        self.request_prefill_computed.observe(times.prompt_tokens - times.cached_tokens)
        if times.answer_tokens > 1:
            self.per_output_token.observe(times.decode_s / (times.answer_tokens - 1))


class EngineCollector(Collector):
    """Turns the state of one engine into samples, on each scrape."""

    def __init__(
        self,
        name: str,
        scheduler: model.Scheduler,
        metrics: Metrics,
        transfers: transfer.Counts | None = None,
    ) -> None:
        self._labels = {"engine": "0", "model_name": name}
        self._transfers = transfers
        self._scheduler = scheduler
        self._metrics = metrics

    def collect(self) -> Iterable[Family]:
        m, s = self._metrics, self._scheduler
        waiting = len(s.waiting)
        yield self._gauge("num_requests_running", "Requests in the running batch.", len(s.running))
        yield self._gauge("num_requests_waiting", "Requests that wait to be run.", waiting)
        yield self._gauges(
            "num_requests_waiting_by_reason",
            "Requests that wait to be run, by reason.",
            "reason",
            {"capacity": waiting, "deferred": 0},
        )
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the KV blocks in use, 1 for all.", s.pool.usage
        )
        yield self._gauges(
            "engine_sleep_state",
            "Which sleep state the engine is in.",
            "sleep_state",
            {"awake": 1, "weights_offloaded": 0, "discard_all": 0},
        )
        yield self._cache_config()
        if s.limits.max_loras:
            yield self._adapters()
        yield self._counter(
            "prefix_cache_queries", "Tokens looked up in the prefix cache.", s.prefix_queries
        )
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", s.prefix_hits)
        yield self._counter(
            "external_prefix_cache_queries",
            "Tokens looked up in other engines' caches.",
            m.external_prompt_tokens,
        )
        yield self._counter(
            "external_prefix_cache_hits",
            "Tokens found in other engines' caches.",
            m.external_prompt_tokens,
        )
        yield self._counter("num_preemptions", "Preemptions.", s.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens of computed prompts.", m.prompt_tokens)
        yield self._counter(
            "prompt_tokens_cached", "Prompt tokens found cached.", m.cached_prompt_tokens
        )
        yield self._counters(
            "prompt_tokens_by_source",
            "Prompt tokens by where their KV came from.",
            "source",
            dict(
                zip(
                    SOURCES,
                    (
                        m.prompt_tokens - m.cached_prompt_tokens - m.external_prompt_tokens,
                        m.cached_prompt_tokens,
                        m.external_prompt_tokens,
                    ),
                    strict=True,
                )
            ),
        )
        if (transfers := self._transfers) is not None:
            yield self._counter(
                "nixl_num_failed_transfers", "KV transfers that failed.", transfers.failed
            )
            yield self._counter(
                "nixl_num_kv_expired_reqs", "Leases of KV blocks that ended.", transfers.expired
            )
        yield self._counter("generation_tokens", "Tokens produced.", m.generation_tokens)
        yield self._counters(
            "request_success", "Requests that ended, by reason.", "finished_reason", m.finished
        )
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Seconds to the first token.", m.first_token),
            ("inter_token_latency_seconds", "Seconds between two tokens.", m.inter_token),
            (
                "request_time_per_output_token_seconds",
                "Mean seconds for a token after the first, by request.",
                m.per_output_token,
            ),
            ("e2e_request_latency_seconds", "Seconds from arrival to end.", m.total),
            ("request_queue_time_seconds", "Seconds waiting.", m.queue),
            ("request_inference_time_seconds", "Seconds running.", m.inference),
            ("request_prefill_time_seconds", "Seconds of prefill.", m.prefill),
            ("request_decode_time_seconds", "Seconds of decode.", m.decode),
            ("iteration_tokens_total", "Tokens computed in a step.", m.step_tokens),
            ("request_num_preemptions", "Preemptions of a request.", m.preemptions),
            ("request_prompt_tokens", "Prompt tokens of a request.", m.request_prompt),
            (
                "request_generation_tokens",
                "Tokens produced for a request.",
                m.request_generation,
            ),
            (
                "request_max_num_generation_tokens",
                "Most tokens asked for, by request.",
                m.request_max_tokens,
            ),
            ("request_params_max_tokens", "The max_tokens parameter.", m.request_max_tokens),
            ("request_params_n", "The n parameter.", m.answers),
            (
                "request_prefill_kv_computed_tokens",
                "Prompt tokens computed for a request, without cached ones.",
                m.request_prefill_computed,
            ),
        ):
            yield self._histogram(name, text, histogram)

    def _cache_config(self) -> GaugeMetricFamily:
        limits = self._scheduler.limits
        labels = {
            "engine": "0",
            "block_size": str(limits.block_size),
            "num_gpu_blocks": str(limits.total_blocks),
            "enable_prefix_caching": str(limits.prefix_caching),
            "prefix_caching_hash_algo": "sha256",
            "cache_dtype": "auto",
            "kv_cache_size_tokens": str(limits.total_blocks * limits.block_size),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Settings of the KV cache.", labels=list(labels)
        )
        family.add_metric(list(labels.values()), 1)
        return family

    def _adapters(self) -> GaugeMetricFamily:
        """What is worth knowing are the labels; the value is the time they hold for."""
        scheduler = self._scheduler
        labels = {
            "max_lora": str(scheduler.limits.max_loras),
            "running_lora_adapters": _names(scheduler.running),
            "waiting_lora_adapters": _names(scheduler.waiting),
        }
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "LoRA adapters of requests.", labels=list(labels)
        )
        family.add_metric(list(labels.values()), time.time())
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _gauges(
        self, name: str, text: str, label: str, values: dict[str, int]
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counters(
        self, name: str, text: str, label: str, values: dict[str, int]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(
            list(self._labels.values()), histogram.buckets(), sum_value=histogram.total
        )
        return family


def _names(sequences: Iterable[model.Sequence]) -> str:
    return ",".join(adapter.name for adapter in model.adapters_of(sequences))


def exposition(collector: EngineCollector) -> bytes:
    """The body of /metrics: the engine's samples in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)
