"""Options of admission and circuit breaking, which every command that picks has in common.

Each alias is one option; `flow_control` and `breaker` make settings of their values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dynamo_epp.admission.settings import FlowControlSettings
    from dynamo_epp.endpoints.breaker import BreakerSettings
    from dynamo_epp.serving import PickerSettings

FlowControl = Annotated[
    bool,
    typer.Option(
        "--flow-control/--no-flow-control",
        envvar="DYN_FLOW_CONTROL",
        help="Queue requests here, by priority and tenant, while the engines are full.",
    ),
]
QueueSeconds = Annotated[
    float,
    typer.Option(
        envvar="DYN_QUEUE_SECONDS", min=0, help="Flow control: longest wait for room; 0: any."
    ),
]
QueueRequests = Annotated[
    int,
    typer.Option(
        envvar="DYN_QUEUE_REQUESTS",
        min=0,
        help="Flow control: requests of one priority that may wait; 0: any number.",
    ),
]
QueueMiB = Annotated[
    float,
    typer.Option(
        "--queue-mib",
        envvar="DYN_QUEUE_MIB",
        min=0,
        help="Flow control: MiB of bodies of one priority that may wait; 0: any number.",
    ),
]
HoldSeconds = Annotated[
    float,
    typer.Option(
        envvar="DYN_HOLD_SECONDS",
        min=0,
        help="How long a request waits for the first worker of its model, when none is ready or "
        "it is scaled to zero; 0: not at all.",
    ),
]
HoldModels = Annotated[
    str,
    typer.Option(
        envvar="DYN_HOLD_MODELS",
        help="Models, separated by commas, that are waited for before a worker was ever there.",
    ),
]
FullQueueDepth = Annotated[
    float,
    typer.Option(
        envvar="DYN_FULL_QUEUE_DEPTH",
        min=0,
        help="An engine is full with so many requests in its own queue; 0: not looked at.",
    ),
]
FullKvUsage = Annotated[
    float,
    typer.Option(
        envvar="DYN_FULL_KV_USAGE",
        min=0,
        max=1,
        help="An engine is full with this share of its KV cache in use; 0: not looked at.",
    ),
]
FullConcurrency = Annotated[
    float,
    typer.Option(
        envvar="DYN_FULL_CONCURRENCY",
        min=0,
        help="An engine is full with so many requests in hand; 0: not looked at.",
    ),
]
TenantHeader = Annotated[
    str,
    typer.Option(
        envvar="DYN_TENANT_HEADER",
        help="Header that names the tenant. Whatever stands in front must set or remove it.",
    ),
]
TenantFromApiKey = Annotated[
    bool,
    typer.Option(
        envvar="DYN_TENANT_FROM_API_KEY",
        help="The tenant is a hash of the API key, where the tenant header says nothing.",
    ),
]
PriorityHeader = Annotated[
    str,
    typer.Option(
        envvar="DYN_PRIORITY_HEADER",
        help="Header that holds the priority, a whole number; below 0 is shed first. Whatever "
        "stands in front must set or remove it.",
    ),
]
TrustFlowHeaders = Annotated[
    bool,
    typer.Option(
        envvar="DYN_TRUST_FLOW_HEADERS",
        help="Believe x-llm-d-inference-fairness-id and -objective, which any client can send.",
    ),
]
TenantRequestsPerSecond = Annotated[
    float,
    typer.Option(
        envvar="DYN_TENANT_REQUESTS_PER_SECOND", min=0, help="Rate limit of each tenant; 0: none."
    ),
]
TenantTokensPerSecond = Annotated[
    float,
    typer.Option(
        envvar="DYN_TENANT_TOKENS_PER_SECOND",
        min=0,
        help="Rate limit of each tenant, prompt and answer; 0: none.",
    ),
]
TenantLimits = Annotated[
    Path | None,
    typer.Option(
        envvar="DYN_TENANT_LIMITS",
        help='JSON file with limits of single tenants: {"name": {"requests_per_s", '
        '"tokens_per_s", "burst_s"}}.',
    ),
]
CircuitBreaker = Annotated[
    bool,
    typer.Option(
        "--circuit-breaker/--no-circuit-breaker",
        envvar="DYN_CIRCUIT_BREAKER",
        help="Send nothing for a while to engines that fail, as long as enough others are left.",
    ),
]
CircuitFailures = Annotated[
    int,
    typer.Option(
        envvar="DYN_CIRCUIT_FAILURES", min=1, help="Failures in a row that open a circuit."
    ),
]


def flow_control(
    *,
    enabled: bool,
    queue_seconds: float,
    queue_requests: int,
    queue_mib: float,
    hold_seconds: float,
    hold_models: str,
    full_queue_depth: float,
    full_kv_usage: float,
    full_concurrency: float,
    tenant_header: str,
    tenant_from_api_key: bool,
    priority_header: str,
    trust_flow_headers: bool,
    requests_per_second: float,
    tokens_per_second: float,
    tenant_limits: Path | None,
) -> FlowControlSettings:
    """Settings from the options' values. Raises ``ValueError``: which option, and what would be
    right."""
    from dynamo_epp.admission.settings import (
        FlowControlSettings,
        IdentitySettings,
        PriorityBand,
        RateLimit,
        RateLimits,
        SaturationSettings,
        read_limits,
    )

    bounds = PriorityBand(0, queue_requests, int(queue_mib * 1024 * 1024))
    return FlowControlSettings(
        enabled=enabled,
        default_request_ttl=queue_seconds,
        no_endpoint_request_ttl=hold_seconds,
        default_priority_band=bounds,
        default_negative_priority_band=bounds,
        saturation=SaturationSettings(
            queue_depth_threshold=full_queue_depth,
            kv_cache_util_threshold=full_kv_usage,
            max_concurrency=full_concurrency,
        ),
        limits=RateLimits(
            default=RateLimit(requests_per_second, tokens_per_second),
            tenants=read_limits(tenant_limits) if tenant_limits is not None else {},
        ),
        identity=IdentitySettings(
            tenant_header=tenant_header,
            api_key=tenant_from_api_key,
            priority_header=priority_header,
            trust_client_headers=trust_flow_headers,
        ),
        models=tuple(name for name in (part.strip() for part in hold_models.split(",")) if name),
    )


def check_waits(picker: PickerSettings, pick_timeout: float) -> None:
    """Raises ``ValueError`` if requests may wait longer, by the options or by the configuration
    where that speaks of it, than whoever asks the picker waits for it: ``pick_timeout`` seconds."""
    from dynamo_epp.serving import flow_control

    settings = flow_control(picker)
    hold, queue = "--hold-seconds", "--queue-seconds"
    if picker.config is not None and picker.config.flow_control is not None:
        hold, queue = "flowControl.noEndpointRequestTTL", "flowControl.defaultRequestTTL"
    waits = {hold: settings.no_endpoint_request_ttl}
    if settings.enabled:
        waits[queue] = settings.default_request_ttl or math.inf
    if (longest := sum(waits.values())) >= pick_timeout:
        told = " and ".join(f"{name} {seconds:g} s" for name, seconds in waits.items())
        raise ValueError(
            f"a request could wait {longest:g} s for its pick ({told}); the proxy gives up after "
            f"{pick_timeout:g} s"
        )


def breaker(*, enabled: bool, failures: int) -> BreakerSettings:
    """Settings from the options' values."""
    from dynamo_epp.endpoints.breaker import BreakerSettings

    return BreakerSettings(enabled=enabled, consecutive_failures=failures)
