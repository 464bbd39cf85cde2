"""Every plugin type that a configuration may name, and what becomes of it.

A type is made here, or something else does its job here (said in a log line), or it does something
that nothing here does: that is an error, because leaving it out would be another behaviour than the
one that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_epp.scheduling.approximate import ApproximateParameters
from dynamo_epp.scheduling.filters import role
from dynamo_epp.scheduling.filters.endpoint_attribute import (
    EndpointAttributeFilter,
    EndpointAttributeParameters,
)
from dynamo_epp.scheduling.filters.label_selector import (
    LabelFilter,
    LabelParameters,
    LabelSelector,
    LabelSelectorParameters,
)
from dynamo_epp.scheduling.filters.session_affinity import SessionAffinityFilter
from dynamo_epp.scheduling.filters.topology_affinity import (
    TopologyAffinityFilter,
    TopologyFilterParameters,
)
from dynamo_epp.scheduling.filters.utilization import Utilization, UtilizationParameters
from dynamo_epp.scheduling.parameters import NoParameters, Parameters
from dynamo_epp.scheduling.pickers.max_score import MaxScorePicker
from dynamo_epp.scheduling.pickers.parameters import PickerParameters
from dynamo_epp.scheduling.pickers.round_robin import RoundRobinPicker
from dynamo_epp.scheduling.pickers.uniform_random import RandomPicker
from dynamo_epp.scheduling.pickers.weighted_random import WeightedRandomPicker
from dynamo_epp.scheduling.scorers.active_request import (
    ActiveRequestParameters,
    ActiveRequestScorer,
)
from dynamo_epp.scheduling.scorers.context_length import ContextLength, ContextLengthParameters
from dynamo_epp.scheduling.scorers.endpoint_attribute import (
    EndpointAttributeScorer,
    EndpointAttributeScorerParameters,
)
from dynamo_epp.scheduling.scorers.header_label_affinity import (
    HeaderLabelAffinityScorer,
    HeaderLabelParameters,
)
from dynamo_epp.scheduling.scorers.kv_cache_utilization import KvCacheUtilizationScorer
from dynamo_epp.scheduling.scorers.kv_cost import KvCostParameters, KvCostScorer
from dynamo_epp.scheduling.scorers.load_aware import LoadAwareParameters, LoadAwareScorer
from dynamo_epp.scheduling.scorers.lora_affinity import LoraAffinityScorer
from dynamo_epp.scheduling.scorers.no_hit_lru import NoHitLruParameters, NoHitLruScorer
from dynamo_epp.scheduling.scorers.prefix_cache import PrefixCacheParameters, PrefixCacheScorer
from dynamo_epp.scheduling.scorers.queue import QueueScorer
from dynamo_epp.scheduling.scorers.running_requests import RunningRequestsScorer
from dynamo_epp.scheduling.scorers.session_affinity import SessionAffinityScorer
from dynamo_epp.scheduling.scorers.token_load import TokenLoadParameters, TokenLoadScorer
from dynamo_epp.scheduling.scorers.topology_affinity import (
    TopologyAffinityScorer,
    TopologyScorerParameters,
)
from dynamo_epp.scheduling.sessions import SessionParameters
from dynamo_epp.scheduling.topology import Topology, TopologyLabels


@dataclass(frozen=True, slots=True)
class Made:
    """A type that is made here: ``make(parameters)``, or ``make(parameters, topology)``."""

    parameters: type[Parameters]
    make: Callable[..., Any]
    reads_prompt: bool = False
    """It looks at the prompt's tokens."""
    topology: bool = False


MADE: Mapping[str, Made] = {
    # filters
    "decode-filter": Made(NoParameters, role.decode),
    "encode-filter": Made(NoParameters, role.encode),
    "endpoint-attribute-filter": Made(EndpointAttributeParameters, EndpointAttributeFilter),
    "label-filter": Made(LabelParameters, LabelFilter),
    "label-selector-filter": Made(LabelSelectorParameters, LabelSelector),
    "prefill-filter": Made(NoParameters, role.prefill),
    "session-affinity-filter": Made(SessionParameters, SessionAffinityFilter),
    "topology-affinity-filter": Made(
        TopologyFilterParameters, TopologyAffinityFilter, topology=True
    ),
    "utilization-filter": Made(UtilizationParameters, Utilization),
    # scorers
    "active-request-scorer": Made(ActiveRequestParameters, ActiveRequestScorer),
    "context-length-aware": Made(ContextLengthParameters, ContextLength, reads_prompt=True),
    "endpoint-attribute-scorer": Made(EndpointAttributeScorerParameters, EndpointAttributeScorer),
    "header-label-affinity-scorer": Made(HeaderLabelParameters, HeaderLabelAffinityScorer),
    "kv-cache-utilization-scorer": Made(NoParameters, KvCacheUtilizationScorer),
    "kv-cost-scorer": Made(KvCostParameters, KvCostScorer, reads_prompt=True),
    "load-aware-scorer": Made(LoadAwareParameters, LoadAwareScorer),
    "lora-affinity-scorer": Made(NoParameters, LoraAffinityScorer),
    "no-hit-lru-scorer": Made(NoHitLruParameters, NoHitLruScorer, reads_prompt=True),
    "prefix-cache-scorer": Made(PrefixCacheParameters, PrefixCacheScorer, reads_prompt=True),
    "queue-scorer": Made(NoParameters, QueueScorer),
    "running-requests-size-scorer": Made(NoParameters, RunningRequestsScorer),
    "session-affinity-scorer": Made(SessionParameters, SessionAffinityScorer),
    "token-load-scorer": Made(TokenLoadParameters, TokenLoadScorer, reads_prompt=True),
    "topology-affinity-scorer": Made(
        TopologyScorerParameters, TopologyAffinityScorer, topology=True
    ),
    # pickers
    "max-score-picker": Made(PickerParameters, MaxScorePicker),
    "random-picker": Made(PickerParameters, RandomPicker),
    "round-robin-picker": Made(PickerParameters, RoundRobinPicker),
    "weighted-random-picker": Made(PickerParameters, WeightedRandomPicker),
}

SETTINGS: Mapping[str, type[Parameters]] = {
    "approx-prefix-cache-producer": ApproximateParameters,
    "topology-extractor": TopologyLabels,
}
"""Types that set something other plugins share."""

RENAMED: Mapping[str, str] = {
    "by-label": "label-filter",
    "by-label-selector": "label-selector-filter",
    "dyn-decode-scorer": "kv-cost-scorer",
    "dyn-prefill-scorer": "kv-cost-scorer",
    "precise-prefix-cache-scorer": "prefix-cache-scorer",
}
"""Older names, Dynamo's for its own cost function, and llm-d's for a scorer that is exact here."""

ELSEWHERE: Mapping[str, str] = {
    "concurrency-detector": "its parameters are settings of flow control",
    "core-metrics-extractor": "every engine's metrics are read four times a second",
    "data-parallel-profile-handler": "each target port of a pod is an endpoint of its own",
    "always-disagg-pd-decider": "prefill and decode are paired by the picker's own settings",
    "disagg-headers-handler": "the picker names the prefill worker by itself",
    "disagg-profile-handler": "the profiles named prefill and decode are used where both exist",
    "endpoint-notification-source": "endpoints come from the picker's own watch",
    "fcfs-ordering-policy": "requests of one tenant go in the order in which they came",
    "global-strict-fairness-policy": "it is a setting of flow control",
    "inflight-load-producer": "the picker counts what each worker has in hand",
    "metrics-data-source": "every engine's metrics are read four times a second",
    "models-data-extractor": "workers and engines tell their models",
    "models-data-source": "workers and engines tell their models",
    "openai-parser": "requests are parsed by their path",
    "pd-profile-handler": "the profiles named prefill and decode are used where both exist",
    "precise-prefix-cache-producer": "the index follows each engine's own cache events",
    "prefill-header-handler": "the picker names the prefill worker by itself",
    "prefix-based-pd-decider": "prefill and decode are paired by the picker's own settings",
    "priority-then-time-eviction-order-policy": "waiting requests are evicted in that order",
    "round-robin-fairness-policy": "it is a setting of flow control",
    "session-id-producer": "session affinity reads the headers that its parameters name",
    "sheddable-eviction-filter": "only waiting requests of negative priority are evicted",
    "single-profile-handler": "the profile for the worker that answers is always used",
    "static-usage-limit-policy": "flow control holds requests back from saturation 1 on",
    "token-producer": "prompts are tokenized with the engines' own tokenizers",
    "tokenizer": "prompts are tokenized with the engines' own tokenizers",
    "utilization-detector": "its parameters are settings of flow control",
    "vllmhttp-parser": "requests are parsed by their path",
}
"""Types whose job is done by another part of this picker: accepted, whatever their parameters."""

NOT_HERE: Mapping[str, str] = {
    "agent-identity": "name the trusted header in the settings of flow control",
    "always-disagg-multimodal-decider": "encoders apart from prefill workers do not exist here",
    "anthropic-parser": "only OpenAI's API is parsed",
    "burst-prefix-cache-producer": "use prefix-cache-scorer without it",
    "dcgm-data-source": "figures come from the engines alone",
    "dcgm-extractor": "figures come from the engines alone",
    "destination-endpoint-served-verifier": "it is an option of `dynamo epp`",
    "disaggregatedset-rollout-screener": "pods of one worker hash are never paired with another's",
    "edf-ordering-policy": "requests of one tenant go in the order in which they came",
    "file-discovery": "name the file with --endpoints-file",
    "header-based-testing-filter": "it is an option of `dynamo epp`",
    "header-profile-handler": "one profile decides for all requests",
    "latency-scorer": "latencies are not predicted; use kv-cost-scorer",
    "latency-slo-admitter": "latencies are not predicted",
    "mm-embeddings-cache-producer": "embeddings of media are not followed",
    "mm-embeddings-cache-scorer": "embeddings of media are not followed",
    "multicluster-approx-prefix-cache-producer": "pools of one cluster only",
    "multicluster-file-discovery": "pools of one cluster only",
    "multicluster-kv-cache-utilization-scorer": "use kv-cache-utilization-scorer",
    "multicluster-metrics-data-source": "pools of one cluster only",
    "multicluster-metrics-extractor": "pools of one cluster only",
    "multicluster-prefix-cache-scorer": "use prefix-cache-scorer",
    "multicluster-queue-scorer": "use queue-scorer",
    "multicluster-session-affinity-filter": "use session-affinity-filter",
    "p2p-source-producer": "caches are not copied between workers",
    "passthrough-parser": "it is an option of `dynamo epp`",
    "predicted-latency-producer": "latencies are not predicted",
    "prefix-cache-affinity-filter": "use prefix-cache-scorer with a high weight",
    "priority-holdback-policy": "flow control holds all priorities back alike",
    "probabilistic-admitter": "use flowControl",
    "program-aware-fairness": "use round-robin-fairness-policy",
    "request-attribute-reporter": "costs of requests are not put into metadata",
    "sglanghttp-parser": "only OpenAI's API is parsed",
    "slo-deadline-ordering-policy": "requests of one tenant go in the order in which they came",
    "slo-headroom-tier-filter": "latencies are not predicted",
    "soft-reflective-ceiling-policy": "flow control holds requests back from saturation 1 on",
    "vertexai-parser": "only OpenAI's API is parsed",
    "vllmgrpc-parser": "only OpenAI's API is parsed",
}
"""Types of llm-d that change what happens in a way that nothing here does, and what to do."""


def make(type_: str, parameters: Parameters, topology: Topology) -> Any:
    """The plugin of a type in ``MADE``."""
    made = MADE[type_]
    return made.make(parameters, topology) if made.topology else made.make(parameters)


def known_types() -> set[str]:
    """Every name that means something, for suggestions."""
    return {*MADE, *SETTINGS, *RENAMED, *ELSEWHERE}
