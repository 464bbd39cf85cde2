"""The picker's metrics.

Where Dynamo measures the same thing the name is Dynamo's, so that people's dashboards and
autoscalers go on; what llm-d's picker measures and Dynamo does not has llm-d's; what only this
picker knows is ``dynamo_epp_*``. Labels are bounded: models come from workers, never from what a
client wrote, and of those at most ``MAX_MODELS``.
"""

from __future__ import annotations

from dynamo_kv_router.load import STALE_S
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MILLISECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_RATIO = tuple(n / 10 for n in range(11))


STAGES = ("tokenize", "total")
MAX_MODELS = 1000
"""Models (LoRA adapters come and go) with labels of their own. llm-d has the same limit."""
OTHER = "other"
"""The label of everything beyond."""
ENDPOINTS = frozenset(("chat_completions", "completions", "embeddings", "responses"))


class PickerMetrics:
    """All metrics of one picker, on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        model = ("model",)
        # Dynamo's names
        self.requests = Counter(
            "dynamo_frontend_requests",
            "Requests that ended: success, error (streams that broke off, too), cancelled by the "
            "client, unavailable where nobody told how.",
            ("model", "endpoint", "request_type", "status"),
            registry=registry,
        )
        self.started = Counter(
            "dynamo_frontend_requests_started", "Requests taken.", model, registry=registry
        )
        self.active = Gauge(
            "dynamo_frontend_active_requests",
            "Requests with an open stream to the picker.",
            model,
            registry=registry,
        )
        self.ttft = Histogram(
            "dynamo_frontend_time_to_first_token_seconds",
            "From the pick to the first token, as the worker reports it.",
            model,
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "dynamo_frontend_request_duration_seconds",
            "From the first byte of the request to the last of the answer, as Envoy logs it.",
            model,
            buckets=_SECONDS,
            registry=registry,
        )
        self.input_tokens = Histogram(
            "dynamo_frontend_input_sequence_tokens",
            "Prompt tokens of requests that were tokenized.",
            model,
            buckets=_TOKENS,
            registry=registry,
        )
        self.output_tokens = Histogram(
            "dynamo_frontend_output_sequence_tokens",
            "Generated tokens, where the engine reports them.",
            model,
            buckets=_TOKENS,
            registry=registry,
        )
        self.cached_tokens = Histogram(
            "dynamo_frontend_cached_tokens",
            "Prompt tokens that the engine took from its cache, where it reports them.",
            model,
            buckets=_TOKENS,
            registry=registry,
        )
        self.hit_rate = Histogram(
            "dynamo_component_router_kv_hit_rate",
            "Share of the prompt's blocks that the chosen worker caches.",
            model,
            buckets=_RATIO,
            registry=registry,
        )
        # the picker's own
        self.decisions = Counter(
            "dynamo_epp_decisions",
            "Picks, by how they were made: exact, approximate, load-only.",
            ("model", "how", "mode"),
            registry=registry,
        )
        self.disagg = Counter(
            "dynamo_epp_disagg_decisions",
            "Requests to graphs whose workers are split: prefill-decode, decode-only (the reason "
            "says why), refused.",
            ("model", "decision", "reason"),
            registry=registry,
        )
        self.refusals = Counter(
            "dynamo_epp_refusals",
            "Requests answered by the picker itself.",
            ("status", "reason"),
            registry=registry,
        )
        self.pick_ms = Histogram(
            "dynamo_epp_pick_milliseconds",
            "From the whole request to the answer: tokenizing alone, and all of it.",
            ("stage",),
            buckets=_MILLISECONDS,
            registry=registry,
        )
        self.schedule = Histogram(
            "llm_d_epp_scheduler_e2e_duration_seconds",
            "Choosing alone: from the tokens to the ranked list of endpoints.",
            buckets=(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
            registry=registry,
        )
        self.stage_ms = {stage: self.pick_ms.labels(stage) for stage in STAGES}
        self.blind_window = Histogram(
            "dynamo_epp_blind_window_seconds",
            "From the pick to the worker's confirmation: how long only the picker knew of it.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            registry=registry,
        )
        self.tokenization = Counter(
            "dynamo_epp_tokenization_checks",
            "Prompt token counts compared with the engine's: match, mismatch, unreported.",
            ("model", "result"),
            registry=registry,
        )
        self.tokenization_exact = Gauge(
            "dynamo_epp_tokenization_exact",
            "1 while the picker's tokens of this model count as exact, else 0; by the kind of "
            "request: chat, completion, embedding, response.",
            ("model", "kind"),
            registry=registry,
        )
        self.workers = Gauge(
            "dynamo_epp_workers",
            "Workers by state: exact, approximate, cache-unknown, not-ready, draining, "
            "terminating.",
            ("state",),
            registry=registry,
        )
        self.without_figures = Gauge(
            "dynamo_epp_workers_without_figures",
            f"Ready workers that told no load figures for {STALE_S:g} s, or never: their load is "
            "what is known of their requests.",
            registry=registry,
        )
        self.cached_blocks = Gauge(
            "dynamo_epp_index_blocks",
            "Blocks in the prefix index, summed over workers.",
            registry=registry,
        )
        self.lost = Counter(
            "dynamo_epp_worker_streams_lost",
            "Times that what was known of a worker's cache became void.",
            registry=registry,
        )
        self.missed = Counter(
            "dynamo_epp_picks_not_followed",
            "Requests that Envoy sent to another endpoint than the first of the pick.",
            ("reason",),
            registry=registry,
        )
        self.circuits = Gauge(
            "dynamo_epp_circuits",
            "Circuits of workers by state: closed, open, half-open; disobeyed are open ones whose "
            "workers get requests all the same, for want of others.",
            ("state",),
            registry=registry,
        )
        self.circuit_openings = Counter(
            "dynamo_epp_circuit_openings",
            "Circuits that opened, by cause: failures in-a-row, ratio of failures, probe that "
            "failed, silent (nothing is heard of the worker).",
            ("cause",),
            registry=registry,
        )
        self.stripped = Counter(
            "dynamo_epp_client_kv_transfer_params_removed",
            "Requests whose kv_transfer_params, which no client may set, were removed.",
            registry=registry,
        )

        self.rewrites = Counter(
            "dynamo_epp_model_rewrites",
            "Requests whose model was rewritten, by InferenceModelRewrite and the model they got.",
            ("rewrite", "target"),
            registry=registry,
        )

        self._labels: set[str] = set()  # models that have labels of their own
        self._models: dict[str, ModelMetrics] = {}  # by label

    def model(self, model: str) -> ModelMetrics:
        """The metrics of one model with their labels bound: looking labels up costs more than
        counting, and a request counts a dozen times."""
        label = self.label(model)
        bound = self._models.get(label)
        if bound is None:
            bound = self._models[label] = ModelMetrics(self, label)
        return bound

    def label(self, model: str) -> str:
        """The model's name, or ``OTHER`` for one of too many, and for requests without one."""
        if not model:
            return OTHER
        if model not in self._labels:
            if len(self._labels) >= MAX_MODELS:
                return OTHER
            self._labels.add(model)
        return model

    CIRCUIT_STATES = ("closed", "open", "half-open", "disobeyed")
    WORKER_STATES = (
        "exact",
        "approximate",
        "cache-unknown",
        "not-ready",
        "draining",
        "terminating",
    )


class ModelMetrics:
    """``PickerMetrics`` for one model."""

    __slots__ = (
        "_decisions",
        "_model",
        "_parent",
        "active",
        "cached_tokens",
        "duration",
        "hit_rate",
        "input_tokens",
        "output_tokens",
        "started",
        "ttft",
    )

    def __init__(self, parent: PickerMetrics, model: str) -> None:
        self._parent = parent
        self._model = model
        self._decisions: dict[tuple[str, str], Counter] = {}
        self.active = parent.active.labels(model)
        self.cached_tokens = parent.cached_tokens.labels(model)
        self.duration = parent.duration.labels(model)
        self.hit_rate = parent.hit_rate.labels(model)
        self.input_tokens = parent.input_tokens.labels(model)
        self.output_tokens = parent.output_tokens.labels(model)
        self.started = parent.started.labels(model)
        self.ttft = parent.ttft.labels(model)

    def ended(self, path: str, stream: bool, result: str) -> None:
        """A request to ``path`` ended with ``result``: success, error, cancelled or unavailable."""
        endpoint = path.removeprefix("/v1/").replace("/", "_")
        self._parent.requests.labels(
            self._model,
            endpoint if endpoint in ENDPOINTS else OTHER,
            "stream" if stream else "unary",
            result,
        ).inc()

    def decision(self, how: str, mode: str) -> Counter:
        bound = self._decisions.get((how, mode))
        if bound is None:
            bound = self._parent.decisions.labels(self._model, how, mode)
            self._decisions[how, mode] = bound
        return bound
