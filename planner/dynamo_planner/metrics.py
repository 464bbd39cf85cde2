"""`dynamo_planner_*`: Dynamo's names where it measures the same, so that dashboards go on.

Whole workers (mode agg) count as decode, as in Dynamo. A mean of nothing is 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram

from dynamo_planner.config.model import PlannerConfig
from dynamo_planner.decision import Decision, RoleDecision
from dynamo_planner.observe import Reading
from dynamo_planner.observe.reading import known

LOAD_STATES = (
    "unset",
    "disabled",
    "no_fpm_data",
    "scaling_in_progress",
    "worker_count_mismatch",
    "insufficient_data",
    "no_change",
    "scale_up",
    "scale_down",
    "scale_down_capped_by_throughput",
    "scale_down_refused_consolidation",
)
THROUGHPUT_STATES = (
    "unset",
    "disabled",
    "no_traffic_data",
    "predict_failed",
    "model_not_ready",
    "set_lower_bound",
    "scale",
)
_SIDE = {"prefill": "prefill", "decode": "decode", "worker": "decode"}


class PlannerMetrics:
    """``show`` brings them up to a decision."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(f"dynamo_planner_{name}", text, tuple(labels), registry=registry)

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"dynamo_planner_{name}", text, tuple(labels), registry=registry)

        def sides(name: str, text: str) -> dict[str, Gauge]:
            return {s: gauge(name.format(s), text.format(s)) for s in ("prefill", "decode")}

        self.replicas = sides("num_{}_replicas", "Replicas of {} workers that are asked for")
        self.decided = sides("predicted_num_{}_replicas", "Replicas of {} workers decided on")
        self.capacity = sides(
            "engine_{}_capacity_requests_per_second",
            "Requests that one {} worker can take a second within the targets",
        )
        self.observed = {
            "ttft_ms": gauge("observed_ttft_ms", "Mean time to first token since the last look"),
            "itl_ms": gauge("observed_itl_ms", "Mean time between tokens since the last look"),
            "rps": gauge("observed_requests_per_second", "Requests a second since the last look"),
            "duration": gauge(
                "observed_request_duration_seconds", "Mean duration of those that ended"
            ),
            "isl": gauge("observed_input_sequence_tokens", "Mean prompt of those that ended"),
            "osl": gauge("observed_output_sequence_tokens", "Mean answer of those that ended"),
        }
        self.predicted = {
            "rps": gauge("predicted_requests_per_second", "Requests a second that are foreseen"),
            "isl": gauge("predicted_input_sequence_tokens", "Mean prompt that is foreseen"),
            "osl": gauge("predicted_output_sequence_tokens", "Mean answer that is foreseen"),
        }
        self.gpu_hours = gauge("gpu_hours", "GPU hours used since the planner began")
        self.sla_ttft = gauge("sla_target_ttft_ms", "Target of the time to first token")
        self.sla_itl = gauge("sla_target_itl_ms", "Target of the time between tokens")
        self.estimated_ttft = gauge(
            "estimated_ttft_ms", "Time to first token of the next request at the busiest worker"
        )
        self.estimated_itl = gauge(
            "estimated_itl_ms", "Time between tokens of the next request at the busiest worker"
        )
        self.load_decision = Enum(
            "dynamo_planner_load_scaling_decision",
            "How the reactive loop decided; of several roles the first that moved or was held",
            states=list(LOAD_STATES),
            registry=registry,
        )
        self.throughput_decision = Enum(
            "dynamo_planner_throughput_scaling_decision",
            "How the predictive loop decided last",
            states=list(THROUGHPUT_STATES),
            registry=registry,
        )
        self.clamped = counter(
            "reconcile_clamped", "Roles that another number was right for, but not for long enough"
        )
        self.capped = counter("constrain_capped", "Decisions that a limit changed")
        self.duration = Histogram(
            "dynamo_planner_tick_duration_seconds", "Duration of a look", registry=registry
        )
        self.lag = gauge("tick_lag_seconds", "How late the last look began")
        self.problem = gauge("problem", "1 while the planner can't do its job; readiness says why")
        self.orders = counter("orders", "Orders by what became of them: taken, failed", ["outcome"])
        self.yielded = counter("scaled_by_others", "Times that somebody else was found to scale")
        self.workers = gauge("workers_ready", "Workers that may get requests", ["role"])
        self.seen = gauge("workers_seen", "Of them, those whose figures are known", ["role"])
        self.age = gauge("readings_age_seconds", "Age of the oldest figures in use", ["role"])
        self.held = gauge("held", "1 while nothing is decided and the replicas are kept", ["role"])
        engine = ["worker_id", "dp_rank"]
        self.queued = gauge(
            "engine_queued_prefill_tokens", "Prompt tokens still to be computed, by worker", engine
        )
        self.in_use = gauge(
            "engine_inflight_decode_kv_tokens", "Tokens in the KV cache in use, by worker", engine
        )
        self.model_error = gauge(
            "model_error",
            "Mean relative error of the performance model in use over the last hour",
            ["role", "model"],
        )

    def targets(self, config: PlannerConfig) -> None:
        self.sla_ttft.set(config.ttft_ms)
        self.sla_itl.set(config.itl_ms)

    def show_engines(self, readings: Iterable[Reading]) -> None:
        """The gauges of single workers; those that are gone have none."""
        self.queued.clear()
        self.in_use.clear()
        for reading in readings:
            usage, size = known(reading.kv_usage), known(reading.kv_tokens)
            for metric, value in (
                (self.queued, known(reading.queued_tokens)),
                (self.in_use, usage * size if usage is not None and size is not None else None),
            ):
                if value is not None:
                    metric.labels(reading.worker, "0").set(value)

    def show(self, decision: Decision) -> None:
        self.gpu_hours.set(decision.gpu_hours)
        if decision.limits:
            self.capped.inc()
        self.model_error.clear()
        for role in decision.roles:
            self._show_role(role)
        states = [role.load_state for role in decision.roles]
        telling = [s for s in states if s not in ("no_change", "disabled")]
        self.load_decision.state((telling or states or ["unset"])[0])
        slow = [role.throughput_state for role in decision.roles]
        self.throughput_decision.state((slow or ["unset"])[0])

    def _show_role(self, role: RoleDecision) -> None:
        side, seen = _SIDE[role.role], role.observed
        self.replicas[side].set(role.desired)
        self.decided[side].set(role.replicas)
        self.workers.labels(role.role).set(seen.ready)
        self.seen.labels(role.role).set(seen.seen)
        self.age.labels(role.role).set(seen.age_s)
        self.held.labels(role.role).set(role.held)
        if role.clamped:
            self.clamped.inc()
        if role.scaled_by_others:
            self.yielded.inc()
        if role.capacity_rps is not None:
            self.capacity[side].set(role.capacity_rps)
        if role.model_error is not None:
            self.model_error.labels(role.role, role.model).set(role.model_error)
        if role.role != "decode":  # what the user waits for first is made here
            self.observed["ttft_ms"].set(1000 * (seen.ttft_s or 0))
            self.observed["rps"].set(seen.rps or 0)
            self.observed["isl"].set(seen.isl or 0)
            self.estimated_ttft.set(1000 * (role.estimated_ttft_s or 0))
            if role.prediction is not None:
                self.predicted["rps"].set(role.prediction.rate)
                self.predicted["isl"].set(role.prediction.isl)
        if role.role != "prefill":
            self.observed["itl_ms"].set(1000 * (seen.itl_s or 0))
            self.observed["duration"].set(seen.request_s or 0)
            self.observed["osl"].set(seen.osl or 0)
            self.estimated_itl.set(1000 * (role.estimated_itl_s or 0))
            if role.prediction is not None:
                self.predicted["osl"].set(role.prediction.osl)
