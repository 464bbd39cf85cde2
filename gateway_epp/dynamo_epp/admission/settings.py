"""What can be set on admission: queues, bounds, saturation, rate limits, and whom to believe.

Names and meanings are those of the ``flowControl`` section of an ``EndpointPickerConfig``, so that
either way of setting them (a file, flags) gives the same object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import msgspec

Fairness = Literal["round-robin", "global-strict"]
"""``round-robin``: the tenants of a band take turns, measured in tokens. ``global-strict``: first
come, first served over all tenants."""

FAIRNESS_ID_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")


def _at_least(owner: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value >= minimum):
            raise ValueError(f"{name} is {value}; it must be a number ≥ {minimum:g}")


@dataclass(frozen=True, slots=True)
class PriorityBand:
    """The queues of one priority. 0 means without bound."""

    priority: int = 0
    max_requests: int = 5000
    max_bytes: int = 1_000_000_000
    """Of the bodies of the requests that wait."""
    fairness: Fairness = "round-robin"

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_requests", "max_bytes")
        if self.fairness not in ("round-robin", "global-strict"):
            raise ValueError(
                f"fairness is {self.fairness!r}; it must be round-robin or global-strict"
            )


@dataclass(frozen=True, slots=True)
class SaturationSettings:
    """When an endpoint is full. Each measure has a threshold at which it counts as 1; 0 leaves
    the measure out."""

    queue_depth_threshold: float = 5
    """Requests in the engine's own queue."""
    kv_cache_util_threshold: float = 0.8
    """Share of the KV cache in use, 0–1."""
    max_concurrency: float = 0
    """Requests in hand."""
    metrics_staleness_s: float = 5.0
    """Older figures count as full. They are told once a second at least."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            0,
            "queue_depth_threshold",
            "kv_cache_util_threshold",
            "max_concurrency",
            "metrics_staleness_s",
        )


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A tenant's limit over all pickers together; 0 means none."""

    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    """Prompt and answer together."""
    burst_s: float = 10.0
    """Seconds of the rate that may be used at once after a pause."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "requests_per_s", "tokens_per_s")
        _at_least(self, 0.001, "burst_s")


@dataclass(frozen=True, slots=True)
class RateLimits:
    default: RateLimit = field(default_factory=RateLimit)
    """For each tenant that is not named, also for requests without one (together)."""
    tenants: Mapping[str, RateLimit] = field(default_factory=dict)
    replicas: int = 0
    """Pickers that share the limits; 0: as many as the workers say are connected to them. Stock
    engines can't say."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "replicas")

    def of(self, tenant: str) -> RateLimit:
        return self.tenants.get(tenant, self.default)


def read_limits(path: Path) -> dict[str, RateLimit]:
    """Limits of single tenants from a JSON file, ``{"name": {"requests_per_s", "tokens_per_s",
    "burst_s"}}``. Raises ``ValueError`` with the file's name and what is wrong."""
    try:
        read = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, float]])
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from error
    known = [field.name for field in fields(RateLimit)]
    limits = {}
    for tenant, given in read.items():
        for name in given:
            if name not in known:
                has = ", ".join(known)
                raise ValueError(f"{path}: {tenant} has {name!r}; a limit has {has}")
        try:
            limits[tenant] = RateLimit(**given)
        except ValueError as error:
            raise ValueError(f"{path}: {tenant}: {error}") from error
    return limits


@dataclass(frozen=True, slots=True)
class IdentitySettings:
    """Whom to believe about tenant and priority. Nobody, by default: one tenant, priority 0.

    A header is believed whoever sent it: name one only if the gateway in front sets or removes it
    on every request, after authentication.
    """

    tenant_header: str = ""
    api_key: bool = False
    """The tenant is a hash of the key in ``authorization`` (``key-`` and 16 hex digits of its
    SHA-256), where the tenant header says nothing. The key itself is checked by whoever stands in
    front, or by nobody."""
    priority_header: str = ""
    """Holds a whole number."""
    trust_client_headers: bool = False
    """Believe ``x-llm-d-inference-fairness-id`` and ``x-llm-d-inference-objective`` (and their
    older names), which every client can send."""


@dataclass(frozen=True, slots=True)
class FlowControlSettings:
    """All times are seconds, all sizes bytes; 0 is no bound unless said otherwise."""

    enabled: bool = False
    """Requests wait here while the engines are full, and not in the engines. Without it, they wait
    here only while there is no endpoint at all."""
    max_requests: int = 0
    """That wait, over all bands."""
    max_bytes: int = 0
    default_request_ttl: float = 60.0
    """How long a request waits for room."""
    no_endpoint_request_ttl: float = 60.0
    """How long a request waits for the first endpoint of its model (none is ready, or it is scaled
    to zero); 0: not at all. At most as long as gateway and clients wait."""
    default_priority_band: PriorityBand = field(default_factory=PriorityBand)
    """For priorities ≥ 0 that have no band of their own."""
    default_negative_priority_band: PriorityBand = field(
        default_factory=lambda: PriorityBand(priority=-1)
    )
    """For the others below 0: requests that may be shed."""
    priority_bands: tuple[PriorityBand, ...] = ()
    shed_when_saturated: bool = True
    """Requests of negative priority are refused as soon as the engines are full. Otherwise they
    wait behind all others, and are evicted when those need their place."""
    saturation: SaturationSettings = field(default_factory=SaturationSettings)
    limits: RateLimits = field(default_factory=RateLimits)
    identity: IdentitySettings = field(default_factory=IdentitySettings)
    models: tuple[str, ...] = ()
    """Names that are served even while no worker is there to say so: requests for them are held.
    Names that a worker told once need not be listed."""
    demand_s: float = 300.0
    """A request that found no endpoint counts as demand for so long after it was given up, so that
    whoever scales sees it, and goes on seeing it while a worker starts."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            0,
            "max_requests",
            "max_bytes",
            "default_request_ttl",
            "no_endpoint_request_ttl",
            "demand_s",
        )
        priorities = [band.priority for band in self.priority_bands]
        for priority in priorities:
            if priorities.count(priority) > 1:
                raise ValueError(f"priority_bands has priority {priority} twice")

    def band(self, priority: int) -> PriorityBand:
        """The bounds that hold for ``priority``."""
        for band in self.priority_bands:
            if band.priority == priority:
                return band
        return self.default_priority_band if priority >= 0 else self.default_negative_priority_band
