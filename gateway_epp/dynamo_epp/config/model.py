"""The file's shape, field by field, as llm-d's picker of 2026 reads it.

Source: `apix/config/v1alpha1` of llm-d-router; the older API group has the same fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from dynamo_crds.schema import (
    QUANTITY_EXPECTED,
    Bool,
    Model,
    Number,
    Opaque,
    Text,
    is_quantity,
    quantity_number,
)
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

KIND = "EndpointPickerConfig"
API_VERSIONS = ("llm-d.ai/v1alpha1", "inference.networking.x-k8s.io/v1alpha1")

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def _duration(value: Any) -> Any:
    """Go's notation, which Kubernetes uses: ``1m30s``, ``150ms``, ``0``."""
    text = str(value) if value == 0 else value
    if isinstance(text, str) and text.strip("0") == "" and text:
        return 0.0
    if isinstance(text, str):
        parts = _PART.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    raise PydanticCustomError(
        "duration", "malformed", {"expected": "a duration such as 60s, 1m30s or 150ms"}
    )


Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds."""


def _size(value: Any) -> int:
    if not is_quantity(value):
        raise PydanticCustomError("quantity", "malformed", {"expected": QUANTITY_EXPECTED})
    return int(quantity_number(value))


Size = Annotated[int, BeforeValidator(_size)]
"""A Kubernetes quantity as a whole number: ``1G``, ``512Mi``, ``5000``."""


class PluginSpec(Model):
    """A plugin to make."""

    type: Text
    name: str = ""
    """The type, by default."""
    parameters: Opaque = Field(default_factory=dict)


class ProfilePlugin(Model):
    """Use of a plugin in a profile."""

    plugin_ref: Text
    weight: Annotated[Number, Field(ge=0)] | None = None
    """For scorers; 1 by default."""


class SchedulingProfile(Model):
    name: Text
    plugins: list[ProfilePlugin] = Field(default_factory=list)


class PluginRef(Model):
    plugin_ref: Text


class Source(Model):
    plugin_ref: Text
    extractors: list[PluginRef] = Field(default_factory=list)


class DataLayer(Model):
    inject_defaults: Bool | None = None
    sources: list[Source] = Field(default_factory=list)
    discovery: PluginRef | None = None
    peer_discovery: PluginRef | None = None
    cross_replica_syncer_plugin_ref: str = ""
    cross_replica_sync_interval: Duration | None = None


class PriorityBandSpec(Model):
    priority: int = 0
    max_bytes: Size | None = None
    max_requests: Size | None = None
    fairness_policy_ref: str = ""
    ordering_policy_ref: str = ""


class SaturationDetector(Model):
    plugin_ref: str = ""


class FlowControl(Model):
    max_bytes: Size | None = None
    max_requests: Size | None = None
    default_request_ttl: Annotated[Duration | None, Field(alias="defaultRequestTTL")] = None
    no_endpoint_request_ttl: Annotated[Duration | None, Field(alias="noEndpointRequestTTL")] = None
    default_priority_band: PriorityBandSpec | None = None
    default_negative_priority_band: PriorityBandSpec | None = None
    priority_bands: list[PriorityBandSpec] = Field(default_factory=list)
    usage_limit_policy_plugin_ref: str = ""
    saturation_detector: SaturationDetector | None = None
    enable_eviction: Bool = False


class RequestHandler(Model):
    parsers: list[PluginRef] = Field(default_factory=list)


class EndpointPickerConfig(Model):
    api_version: str
    kind: str
    metadata: Opaque = Field(default_factory=dict)
    feature_gates: list[str] = Field(default_factory=list)
    plugins: list[PluginSpec] = Field(default_factory=list)
    scheduling_profiles: list[SchedulingProfile] = Field(default_factory=list)
    data_layer: DataLayer | None = None
    flow_control: FlowControl | None = None
    request_handler: RequestHandler | None = None
    saturation_detector: SaturationDetector | None = None
    """Older place of ``flowControl.saturationDetector``."""
    parser: PluginRef | None = None
    """Older form of ``requestHandler.parsers``."""
