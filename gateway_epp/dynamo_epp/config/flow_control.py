"""The section ``flowControl`` as settings of `dynamo_epp.admission`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

from dynamo_crds.schema import Count, Number
from pydantic import Field

from dynamo_epp.admission.settings import (
    Fairness,
    FlowControlSettings,
    PriorityBand,
    SaturationSettings,
)
from dynamo_epp.config.model import Duration, FlowControl, PriorityBandSpec
from dynamo_epp.scheduling.parameters import Parameters

_Number = TypeVar("_Number", int, float)

FEATURE_GATE = "flowControl"
LEAST_STALENESS_S = 2.0
"""Figures of our workers are up to a second old, and an answer takes its time."""

FAIRNESS: Mapping[str, Fairness] = {
    "round-robin-fairness-policy": "round-robin",
    "global-strict-fairness-policy": "global-strict",
}
ORDERING = ("fcfs-ordering-policy",)


class UtilizationDetector(Parameters):
    queue_depth_threshold: Count = 5
    kv_cache_util_threshold: Annotated[Number, Field(gt=0, le=1)] = 0.8
    metrics_staleness_threshold: Duration | None = None
    headroom: Number | None = None
    """Accepted: how far over its thresholds an endpoint may still be chosen. Filters say that."""


class ConcurrencyDetector(Parameters):
    max_concurrency: Count = 100
    max_token_concurrency: Count | None = None
    """Accepted; requests are counted."""
    concurrency_mode: Literal["requests"] = "requests"
    headroom: Number | None = None
    """Accepted, as above."""
    in_flight_load_producer_name: str = ""
    """Accepted; there is one count of requests in hand."""


DETECTORS: Mapping[str, type[Parameters]] = {
    "concurrency-detector": ConcurrencyDetector,
    "utilization-detector": UtilizationDetector,
}


def saturation(detector: Parameters | None) -> tuple[SaturationSettings, str]:
    """Settings by a detector's parameters (None: the defaults), and a note or ""."""
    if isinstance(detector, ConcurrencyDetector):
        return SaturationSettings(
            queue_depth_threshold=0,
            kv_cache_util_threshold=0,
            max_concurrency=detector.max_concurrency,
        ), ""
    if not isinstance(detector, UtilizationDetector):
        return SaturationSettings(), ""
    settings = SaturationSettings(
        queue_depth_threshold=detector.queue_depth_threshold,
        kv_cache_util_threshold=detector.kv_cache_util_threshold,
    )
    given = detector.metrics_staleness_threshold
    if given is None:
        return settings, ""
    if given < LEAST_STALENESS_S:
        return settings, (
            f"metricsStalenessThreshold {given:g}s is taken as {settings.metrics_staleness_s:g}s: "
            "figures are up to a second old"
        )
    return replace(settings, metrics_staleness_s=given), ""


def settings(
    section: FlowControl | None,
    gates: list[str],
    types: Mapping[str, str],
    detector: Parameters | None,
) -> tuple[FlowControlSettings | None, list[str]]:
    """Settings, or None if neither section nor feature gate is there; and notes.

    ``types`` gives the type of each plugin by name.
    """
    enabled = FEATURE_GATE in gates
    if section is None and not enabled:
        return None, []
    given = section or FlowControl()
    saturated, note = saturation(detector)
    notes = [note] if note else []
    if not enabled:
        notes.append(f"flowControl is off without featureGates: [{FEATURE_GATE}]")
    if given.enable_eviction:
        notes.append("enableEviction: requests are evicted while they wait, not once they run")
    base = FlowControlSettings()
    default = _band(given.default_priority_band, base.default_priority_band, types)
    negative = _band(
        given.default_negative_priority_band, base.default_negative_priority_band, types
    )
    return FlowControlSettings(
        enabled=enabled,
        max_requests=_or(given.max_requests, base.max_requests),
        max_bytes=_or(given.max_bytes, base.max_bytes),
        default_request_ttl=_or(given.default_request_ttl, base.default_request_ttl),
        no_endpoint_request_ttl=_or(given.no_endpoint_request_ttl, base.no_endpoint_request_ttl),
        default_priority_band=default,
        default_negative_priority_band=negative,
        priority_bands=tuple(
            _band(band, default if band.priority >= 0 else negative, types)
            for band in given.priority_bands
        ),
        shed_when_saturated=not given.enable_eviction,
        saturation=saturated,
    ), notes


def policies(section: FlowControl) -> Iterator[tuple[tuple[str | int, ...], str, tuple[str, ...]]]:
    """(path, reference, types that are right there) of each policy that the section refers to."""
    bands: list[tuple[tuple[str | int, ...], PriorityBandSpec]] = [
        (("priorityBands", at), band) for at, band in enumerate(section.priority_bands)
    ]
    if section.default_priority_band:
        bands.append((("defaultPriorityBand",), section.default_priority_band))
    if section.default_negative_priority_band:
        bands.append((("defaultNegativePriorityBand",), section.default_negative_priority_band))
    for path, band in bands:
        if band.fairness_policy_ref:
            yield (*path, "fairnessPolicyRef"), band.fairness_policy_ref, tuple(FAIRNESS)
        if band.ordering_policy_ref:
            yield (*path, "orderingPolicyRef"), band.ordering_policy_ref, ORDERING
    if section.usage_limit_policy_plugin_ref:
        reference = section.usage_limit_policy_plugin_ref
        yield ("usageLimitPolicyPluginRef",), reference, ("static-usage-limit-policy",)


def _band(
    given: PriorityBandSpec | None, base: PriorityBand, types: Mapping[str, str]
) -> PriorityBand:
    if given is None:
        return base
    reference = given.fairness_policy_ref
    return PriorityBand(
        priority=given.priority or base.priority,
        max_requests=_or(given.max_requests, base.max_requests),
        max_bytes=_or(given.max_bytes, base.max_bytes),
        fairness=FAIRNESS[types.get(reference, reference)] if reference else base.fairness,
    )


def _or(given: _Number | None, default: _Number) -> _Number:
    return default if given is None else given
