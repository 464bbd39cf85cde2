"""The configuration, key by key. Names and defaults are Dynamo's where it has the key.

Source: `dynamo.planner.config.planner_config` of Dynamo 1.6; keys of our own say so.
"""

from __future__ import annotations

from typing import Annotated, Literal

from dynamo_crds.schema import Bool, Model, Number, Positive, Text
from pydantic import ConfigDict, Field, StrictInt

from dynamo_planner.config.rules import RULES

Whole = Annotated[StrictInt, Field(ge=0)]
Above0 = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Percent = Annotated[Number, Field(ge=0, le=100)]

Role = Literal["worker", "prefill", "decode"]
ROLES: dict[str, tuple[Role, ...]] = {
    "agg": ("worker",),
    "disagg": ("prefill", "decode"),
    "prefill": ("prefill",),
    "decode": ("decode",),
}
"""Mode -> the roles that it scales; component types of a graph have these names too."""


class Keys(Model):
    """Base: keys are written as they are named here, unknown ones are refused."""

    model_config = ConfigDict(alias_generator=None, frozen=True)


class ComponentLimits(Keys):
    """Ours: what holds for one component of the graph, by its name."""

    min_endpoint: Positive | None = None
    """Fewest replicas."""
    max_endpoint: Positive | None = None
    """Most replicas."""
    cost: Above0 = 1.0
    """Of one replica, in any unit: of several components of a role the cheapest grows first and the
    dearest shrinks first."""


class Roofline(Keys):
    """Ours: what GPU and model can do at best, for an estimate where nothing was measured."""

    parameters: Above0
    """Of the model, those active for a token, in billions."""
    weight_bytes: Above0
    """Of the weights on one replica's GPUs together, in billions."""
    kv_bytes_per_token: Above0
    """Of the KV cache: layers × KV heads × head size × 2 × bytes of an element."""
    tflops: Above0
    """Of one replica's GPUs together, in the weights' precision."""
    bandwidth_gb_s: Above0
    """Of their memory together."""
    compute_efficiency: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Share of ``tflops`` that a prefill reaches."""
    memory_efficiency: Annotated[Number, Field(gt=0, le=1)] = 0.7
    """Share of ``bandwidth_gb_s`` that a decode step reaches."""


class PlannerConfig(Keys):
    """How a graph is scaled."""

    rules = RULES

    mode: Literal["agg", "disagg", "prefill", "decode"] = "disagg"
    """What the graph is made of: whole workers, prefill and decode workers, or one of the two."""
    backend: Literal["vllm", "mocker"] = "vllm"
    """Whose metrics the engines publish; those of the simulated engine are vLLM's."""
    environment: Literal["kubernetes", "virtual"] = "kubernetes"
    """Accepted; where the planner runs says by itself how it scales."""
    optimization_target: Literal["throughput", "latency", "load", "sla"] = "throughput"
    """`throughput`, `latency`: fixed thresholds of queue and KV cache use. `load`: thresholds of
    your own. `sla`: as few replicas as hold `ttft_ms` and `itl_ms`."""
    enable_throughput_scaling: Bool = True
    """Target sla: the predictive loop, every `throughput_adjustment_interval_seconds`."""
    enable_load_scaling: Bool = False
    """Target sla: the reactive loop, every `load_adjustment_interval_seconds`. With both on, the
    predictive one sets the least."""
    advisory: Bool = False
    """Decide, log and publish, but scale nothing."""

    ttft_ms: Above0 = 500.0
    """Target sla: time to first token, milliseconds."""
    itl_ms: Above0 = 50.0
    """Target sla: time between two tokens, milliseconds."""

    max_gpu_budget: StrictInt = 8
    """Most GPUs of all workers together; negative: no limit."""
    min_gpu_budget: StrictInt = -1
    """Fewest; negative: no limit."""
    min_endpoint: Positive = 1
    """Fewest replicas of each role."""
    prefill_min_endpoint: Positive | None = None
    """Fewest prefill workers, instead."""
    decode_min_endpoint: Positive | None = None
    """Fewest decode workers, instead."""
    max_endpoint: Positive | None = None
    """Ours: most replicas of each role."""
    prefill_max_endpoint: Positive | None = None
    """Ours: most prefill workers, instead."""
    decode_max_endpoint: Positive | None = None
    """Ours: most decode workers, instead."""
    prefill_engine_num_gpu: Positive | None = None
    """GPUs of a prefill worker; by default what its pod asks for, else 1."""
    decode_engine_num_gpu: Positive | None = None
    """GPUs of a decode worker, or of a whole one in mode agg."""
    min_prefill_decode_ratio: Above0 | None = None
    """Ours: fewest prefill workers for each decode worker; decode gives way."""
    max_prefill_decode_ratio: Above0 | None = None
    """Ours: most prefill workers for each decode worker; prefill gives way."""
    components: dict[Text, ComponentLimits] = Field(default_factory=dict)
    """Ours: bounds and cost of components, by name."""

    throughput_adjustment_interval_seconds: Above0 = 180.0
    """Between two predictive decisions."""
    max_throughput_scaling_replicas: Positive = 8
    """Most replicas by which one predictive decision moves a role."""
    load_adjustment_interval_seconds: Above0 = 5.0
    """Between two looks at the workers, and two reactive decisions."""
    load_scaling_down_sensitivity: Percent = 80.0
    """Target sla, reactive: fewer replicas only if the estimates stay below this share of the
    targets; 0: never."""
    load_min_observations: Positive = 5
    """Looks at a role's workers before the first reactive decision."""
    prefill_scale_up_queue_tokens: Whole | None = None
    """Target load: more prefill workers when more tokens than this wait at one."""
    prefill_scale_down_queue_tokens: Whole | None = None
    """Target load: fewer when fewer wait at all."""
    decode_scale_up_kv_rate: Percent | None = None
    """Target load: more workers when one's KV cache use, what waits included, is above, percent."""
    decode_scale_down_kv_rate: Percent | None = None
    """Target load: fewer when that of all is below."""

    max_load_scaling_replicas: Positive = 4
    """Ours: most replicas that one reactive decision adds. It takes away one."""
    scale_up_stabilization_seconds: NotNegative = 5.0
    """Ours: for so long more must have been found right before the reactive loop adds any; then it
    is the least of that. One look is a moment, and a queue of a moment is none."""
    scale_up_cooldown_seconds: NotNegative = 15.0
    """Ours: between two reactive steps up of a role."""
    scale_down_stabilization_seconds: NotNegative = 120.0
    """Ours: a role gets as many replicas as the most that was found right in this time, as
    HorizontalPodAutoscalers have it: so an up is never followed by a down earlier than this."""
    scaling_timeout_seconds: Above0 = 1800.0
    """Ours: how long a change may take before deciding goes on without waiting for it."""
    metrics_staleness_seconds: Above0 = 15.0
    """Ours: older readings of a worker count as none."""
    min_coverage: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Ours: share of the workers' time that must have been seen for a rate to count as known."""

    load_predictor: Literal["constant", "arima", "kalman", "holt-winters", "prophet"] = "arima"
    """How the next interval's traffic is foreseen; `prophet` is answered by `holt-winters`."""
    load_predictor_log1p: Bool = False
    """Foresee the logarithm instead: traffic that grows by shares, not by amounts."""
    load_predictor_warmup_trace: Text | None = None
    """A request trace (mooncake's JSON lines) that past traffic is taken from at the start."""
    load_predictor_season: Annotated[StrictInt, Field(ge=2)] | None = None
    """Ours: intervals in a season, for `holt-winters`; a day by default."""
    kalman_q_level: Above0 = 1.0
    """Variance of the level's noise."""
    kalman_q_trend: Above0 = 0.1
    """Variance of the trend's noise."""
    kalman_r: Above0 = 10.0
    """Variance of an observation's noise."""
    kalman_min_points: Positive = 5
    """Intervals that must have been seen first."""

    profile_results_dir: Text = "profiling_results"
    """A timing profile, or a folder with `timing-profile.json` or `.yaml`, or with
    `prefill.*` and `decode.*` of these."""

    metric_pulling_prometheus_endpoint: Text | None = None
    """A Prometheus that scrapes the workers; by default they are asked directly."""
    metric_pulling_prometheus_token: Text | None = Field(default=None, exclude=True)
    """Bearer token for it; never shown or recorded."""
    metric_pulling_prometheus_token_file: Text | None = None
    """A file with the token, read before each query."""
    metric_pulling_prometheus_ssl_verify: Bool = False
    """Verify its certificate."""
    metric_pulling_prometheus_ca_bundle: Text | None = None
    """A file with the authorities that may have signed it; given, it is verified."""
    metric_pulling_prometheus_extra_query_params: dict[str, Text] | None = None
    """Appended to the URL of each query."""
    metric_pulling_prometheus_request_timeout_seconds: Above0 = 10.0
    """For each query."""

    roofline: Roofline | None = None
    """Ours: reckon with this where there is no profile."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """What this mode scales."""
        return ROLES[self.mode]

    @property
    def predictive(self) -> bool:
        """Whether the slow loop runs."""
        return self.optimization_target == "sla" and self.enable_throughput_scaling

    @property
    def reactive(self) -> bool:
        """Whether the fast loop runs."""
        return self.optimization_target != "sla" or self.enable_load_scaling

    def fewest(self, role: Role) -> int:
        """Replicas that ``role`` never falls below."""
        own = {"prefill": self.prefill_min_endpoint, "decode": self.decode_min_endpoint}.get(role)
        return self.min_endpoint if own is None else own

    def most(self, role: Role) -> int | None:
        """Replicas that ``role`` never exceeds; None: no limit but the budget."""
        own = {"prefill": self.prefill_max_endpoint, "decode": self.decode_max_endpoint}.get(role)
        return self.max_endpoint if own is None else own

    def gpus(self, role: Role) -> int | None:
        """GPUs of one replica, where the configuration says it."""
        return self.prefill_engine_num_gpu if role == "prefill" else self.decode_engine_num_gpu
