"""Conversion between v1alpha1 and v1beta1, without loss in either direction.

Both versions are translated section by section: the graph's own fields, each component, the
status. What the other version cannot say, and the form in which something was said, goes into an
annotation of the converted object: the original section beside a digest of what it was translated
to. On the way back the digest tells whether the section is untouched: then the original returns as
it was; otherwise the changed section is translated afresh, in the form of the original as far as
that fits (`services`), and the fields that the other version has no word for are taken from it.

Fields with the same name and shape in both versions are always copied and belong to no record, so
a change of replicas never costs a manifest its form.

Digests are taken with defaults filled in, because the API server fills them in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dynamo_crds import v1alpha1, v1beta1
from dynamo_crds.schema import Model, pruned
from dynamo_crds.services import (
    ONLY_V1ALPHA1_SERVICE,
    component_like,
    component_of,
    present,
    service_like,
    service_of,
    without,
)

SAID_IN_V1ALPHA1 = "nvidia.com/dynamo-platform-v1alpha1"
"""Annotation of a v1beta1 object: what its v1alpha1 form says that v1beta1 cannot."""
SAID_IN_V1BETA1 = "nvidia.com/dynamo-platform-v1beta1"
"""Annotation of a v1alpha1 object: what its v1beta1 form says that v1alpha1 cannot."""

Json = dict[str, Any]

_PLAIN_COMPONENT = frozenset(
    {
        "replicas",
        "minAvailable",
        "globalDynamoNamespace",
        "runtimeVersionOverride",
        "providerOverride",
        "topologyConstraint",
        "modelRef",
        "multinode",
    }
)
_PLAIN_SPEC = frozenset(
    {
        "backendFramework",
        "annotations",
        "labels",
        "priorityClassName",
        "restart",
        "providerOverride",
        "experimental",
    }
)


# --- the graph's own fields, the status -----------------------------------------------------------


def _spec_to_v1beta1(spec: Json) -> Json:
    result = present(env=spec.get("envs"))
    topology = spec.get("topologyConstraint")
    if topology is not None:
        rest = without(topology, "topologyProfile")
        result["topologyConstraint"] = {"clusterTopologyName": topology["topologyProfile"], **rest}
    return result


def _spec_to_v1alpha1(spec: Json) -> Json:
    result = present(envs=spec.get("env"))
    topology = spec.get("topologyConstraint")
    if topology is not None:
        rest = without(topology, "clusterTopologyName")
        result["topologyConstraint"] = {"topologyProfile": topology["clusterTopologyName"], **rest}
    return result


def _spec_like(spec: Json, original: Json) -> Json:
    return {**present(pvcs=original.get("pvcs")), **_spec_to_v1alpha1(spec)}


def _status_to_v1beta1(status: Json) -> Json:
    result = without(status, "services")
    if "services" in status:
        result["components"] = {
            name: {
                **without(replicas, "componentName"),
                "componentNames": replicas.get("componentNames") or [replicas["componentName"]],
            }
            for name, replicas in status["services"].items()
        }
    if "conditions" in status:
        result["conditions"] = list({c["type"]: c for c in status["conditions"]}.values())
    rollout = status.get("rollingUpdate", {})
    if "updatedServices" in rollout:
        rest = without(rollout, "updatedServices")
        result["rollingUpdate"] = {**rest, "updatedComponents": rollout["updatedServices"]}
    return result


def _status_to_v1alpha1(status: Json) -> Json:
    result = without(status, "components")
    if "components" in status:
        result["services"] = {
            name: {"componentName": next(iter(replicas.get("componentNames", [])), ""), **replicas}
            for name, replicas in status["components"].items()
        }
    rollout = status.get("rollingUpdate", {})
    if "updatedComponents" in rollout:
        rest = without(rollout, "updatedComponents")
        result["rollingUpdate"] = {**rest, "updatedServices": rollout["updatedComponents"]}
    return result


# --- records --------------------------------------------------------------------------------------


def _digest(model: type[Model], section: Json, fill: Json) -> str:
    full = model.lenient({**section, **_fill(model, fill)}).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    text = json.dumps(full, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Translation:
    """How one kind of section goes one way; `back` is the way back, to see whether a record is
    needed. `source` and `target` check and digest the section; both allow partial sections."""

    source: type[Model]
    target: type[Model]
    forward: Callable[[Json], Json]
    back: Callable[[Json], Json]
    like: Callable[[Json, Json], Json] | None = None
    """`forward` for a section that was edited: what the target had there helps to say it."""


@dataclass(slots=True)
class _Records:
    """Records read from the source's annotation, and those to write on the target."""

    read: Json
    written: Json = field(default_factory=dict)
    # Both: section name -> {"object": the section, "for": digest of its translation};
    # "order" -> names of the components, because a map of services has no order of its own.

    def translate(self, name: str, section: Json, how: _Translation, fill: Json) -> Json:
        """One section in the other version. `fill` makes a partial section a valid object."""
        record = self.read.get(name)
        original = _original(record, how.target, fill)
        same = self._same
        if original is None or not isinstance(record, dict):
            result = how.forward(section)
        elif record.get("for") == _digest(how.source, section, fill):
            result = original
            same = self._same_but_for_defaults
        else:
            result = how.like(section, original) if how.like else how.forward(section)
        if not same(how.source, how.back(result), section, fill):
            digest = _digest(how.target, result, fill)
            self.written[name] = {"object": section, "for": digest}
        return result

    @staticmethod
    def _same(model: type[Model], left: Json, right: Json, fill: Json) -> bool:
        return left == right

    @staticmethod
    def _same_but_for_defaults(model: type[Model], left: Json, right: Json, fill: Json) -> bool:
        return _digest(model, left, fill) == _digest(model, right, fill)


def _fill(model: type[Model], fill: Json) -> Json:
    aliases = {f.alias for f in model.model_fields.values()}
    return {name: value for name, value in fill.items() if name in aliases}


def _original(record: Any, model: type[Model], fill: Json) -> Json | None:
    """The recorded section, or None if there is none that makes sense."""
    section = record.get("object") if isinstance(record, dict) else None
    if not isinstance(section, dict):
        return None
    try:
        model.lenient({**section, **_fill(model, fill)})
    except ValidationError:
        return None
    return section


def _records(metadata: Json, annotation: str) -> _Records:
    try:
        read = json.loads(metadata.get("annotations", {}).get(annotation, "{}"))
    except ValueError:
        read = {}
    return _Records(read if isinstance(read, dict) else {})


def _metadata(metadata: Json, records: _Records, annotation: str) -> Json:
    """The metadata of the target, with the records that it needs."""
    result = dict(metadata)
    annotations = without(metadata.get("annotations", {}), SAID_IN_V1ALPHA1, SAID_IN_V1BETA1)
    if records.written:
        annotations[annotation] = json.dumps(
            records.written, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
    if annotations:
        result["annotations"] = annotations
    else:
        result.pop("annotations", None)
    return result


_COMPONENT_FORWARD = _Translation(
    v1alpha1.Service, v1beta1.Component, component_of, service_of, component_like
)
_COMPONENT_BACK = _Translation(
    v1beta1.Component, v1alpha1.Service, service_of, component_of, service_like
)
_SPEC_FORWARD = _Translation(
    v1alpha1.GraphSpec, v1beta1.GraphSpec, _spec_to_v1beta1, _spec_to_v1alpha1
)
_SPEC_BACK = _Translation(
    v1beta1.GraphSpec, v1alpha1.GraphSpec, _spec_to_v1alpha1, _spec_to_v1beta1, _spec_like
)
_STATUS_FORWARD = _Translation(
    v1alpha1.GraphStatus,
    v1beta1.GraphStatus,
    _status_to_v1beta1,
    _status_to_v1alpha1,
)
_STATUS_BACK = _Translation(
    v1beta1.GraphStatus,
    v1alpha1.GraphStatus,
    _status_to_v1alpha1,
    _status_to_v1beta1,
)


def _split(section: Json, plain: frozenset[str], *apart: str) -> tuple[Json, Json]:
    """The fields that are copied, and those that are translated."""
    copied = {key: value for key, value in section.items() if key in plain}
    rest = {key: value for key, value in section.items() if key not in plain and key not in apart}
    return copied, rest


def _graph_to_v1beta1(source: Json) -> Json:
    records = _records(source["metadata"], SAID_IN_V1BETA1)
    target: Json = {"apiVersion": v1beta1.API_VERSION, "kind": source["kind"]}
    if "spec" in source:
        spec = source["spec"]
        copied, rest = _split(spec, _PLAIN_SPEC, "services")
        target["spec"] = {**copied, **records.translate("spec", rest, _SPEC_FORWARD, {})}
        if "services" in spec:
            order = records.read.get("order")
            names = [n for n in order if n in spec["services"]] if isinstance(order, list) else []
            names += [name for name in spec["services"] if name not in names]
            if order is None and names != sorted(names):
                records.written["order"] = names
            target["spec"]["components"] = [
                _translated(records, name, spec["services"][name], _COMPONENT_FORWARD)
                for name in names
            ]
    if "status" in source:
        target["status"] = records.translate("status", source["status"], _STATUS_FORWARD, {})
    target["metadata"] = _metadata(source["metadata"], records, SAID_IN_V1ALPHA1)
    return target


def _translated(records: _Records, name: str, section: Json, how: _Translation) -> Json:
    copied, rest = _split(section, _PLAIN_COMPONENT, "name")
    result = records.translate(f"component/{name}", rest, how, {"name": name})
    named = {"name": name} if how.target is v1beta1.Component else {}
    return {**named, **copied, **result}


def _graph_to_v1alpha1(source: Json) -> Json:
    records = _records(source["metadata"], SAID_IN_V1ALPHA1)
    target: Json = {"apiVersion": v1alpha1.API_VERSION, "kind": source["kind"]}
    if "spec" in source:
        spec = source["spec"]
        copied, rest = _split(spec, _PLAIN_SPEC, "components")
        target["spec"] = {**copied, **records.translate("spec", rest, _SPEC_BACK, {})}
        if "components" in spec:
            target["spec"]["services"] = {
                component["name"]: _translated(
                    records, component["name"], component, _COMPONENT_BACK
                )
                for component in spec["components"]
            }
            order = [component["name"] for component in spec["components"]]
            if order != sorted(order) and order != records.read.get("order"):
                records.written["order"] = order
    if "status" in source:
        target["status"] = records.translate("status", source["status"], _STATUS_BACK, {})
    target["metadata"] = _metadata(source["metadata"], records, SAID_IN_V1BETA1)
    return target


# --- scaling adapters -----------------------------------------------------------------------------


def _adapter_status_to_v1beta1(status: Json) -> Json:
    return {"replicas": 0, **status}


def _adapter_status_to_v1alpha1(status: Json) -> Json:
    return dict(status)


def _adapter(
    source: Json, version: str, reference: tuple[str, str], annotations: tuple[str, str]
) -> Json:
    records = _records(source["metadata"], annotations[0])
    spec = dict(source["spec"])
    old, new = reference
    spec["dgdRef"] = {**without(spec["dgdRef"], old), new: spec["dgdRef"][old]}
    target: Json = {"apiVersion": version, "kind": source["kind"], "spec": spec}
    if "status" in source:
        forward = _Translation(
            v1alpha1.AdapterStatus,
            v1beta1.AdapterStatus,
            _adapter_status_to_v1beta1,
            _adapter_status_to_v1alpha1,
        )
        back = _Translation(forward.target, forward.source, forward.back, forward.forward)
        how = forward if version == v1beta1.API_VERSION else back
        target["status"] = records.translate("status", source["status"], how, {})
    target["metadata"] = _metadata(source["metadata"], records, annotations[1])
    return target


def _adapter_to_v1beta1(source: Json) -> Json:
    return _adapter(
        source,
        v1beta1.API_VERSION,
        ("serviceName", "componentName"),
        (SAID_IN_V1BETA1, SAID_IN_V1ALPHA1),
    )


def _adapter_to_v1alpha1(source: Json) -> Json:
    return _adapter(
        source,
        v1alpha1.API_VERSION,
        ("componentName", "serviceName"),
        (SAID_IN_V1ALPHA1, SAID_IN_V1BETA1),
    )


# --- entrances ------------------------------------------------------------------------------------


def to_v1beta1(graph: v1alpha1.DynamoGraphDeployment) -> v1beta1.DynamoGraphDeployment:
    """The graph in v1beta1's form; what v1beta1 cannot say is kept in an annotation."""
    return v1beta1.DynamoGraphDeployment.model_validate(_graph_to_v1beta1(graph.manifest()))


def to_v1alpha1(graph: v1beta1.DynamoGraphDeployment) -> v1alpha1.DynamoGraphDeployment:
    """The graph in v1alpha1's form; what v1alpha1 cannot say is kept in an annotation."""
    return v1alpha1.DynamoGraphDeployment.model_validate(_graph_to_v1alpha1(graph.manifest()))


def adapter_to_v1beta1(
    adapter: v1alpha1.DynamoGraphDeploymentScalingAdapter,
) -> v1beta1.DynamoGraphDeploymentScalingAdapter:
    """The scaling adapter in v1beta1's form."""
    return v1beta1.DynamoGraphDeploymentScalingAdapter.model_validate(
        _adapter_to_v1beta1(adapter.manifest())
    )


def adapter_to_v1alpha1(
    adapter: v1beta1.DynamoGraphDeploymentScalingAdapter,
) -> v1alpha1.DynamoGraphDeploymentScalingAdapter:
    """The scaling adapter in v1alpha1's form."""
    return v1alpha1.DynamoGraphDeploymentScalingAdapter.model_validate(
        _adapter_to_v1alpha1(adapter.manifest())
    )


def convert(manifest: Json, api_version: str) -> Json:
    """A manifest of one of our kinds in the version `api_version`, as a conversion webhook needs.

    What exists must stay readable: an object that breaks a rule is converted all the same, and
    fields that are unknown here come back on the way back. Metadata stays as it is but for one
    annotation. Raises ValueError for another kind or version, pydantic's ValidationError where a
    value is of a wrong type.
    """
    source, kind = manifest.get("apiVersion"), manifest.get("kind")
    if source == api_version:
        return manifest
    way = _WAYS.get((str(kind), str(source), api_version))
    if way is None:
        raise ValueError(f"no conversion of {kind} from {source} to {api_version}")
    model, translate = way
    metadata = manifest.get("metadata") or {}
    said = pruned(model, {key: value for key, value in manifest.items() if key != "metadata"})
    said["metadata"] = {**metadata, "annotations": metadata.get("annotations") or {}}
    model.lenient({**said, "metadata": {"name": metadata.get("name") or "unnamed"}})
    return translate(said)


_WAYS: dict[tuple[str, str, str], tuple[type[Model], Callable[[Json], Json]]] = {
    ("DynamoGraphDeployment", v1alpha1.API_VERSION, v1beta1.API_VERSION): (
        v1alpha1.DynamoGraphDeployment,
        _graph_to_v1beta1,
    ),
    ("DynamoGraphDeployment", v1beta1.API_VERSION, v1alpha1.API_VERSION): (
        v1beta1.DynamoGraphDeployment,
        _graph_to_v1alpha1,
    ),
    ("DynamoGraphDeploymentScalingAdapter", v1alpha1.API_VERSION, v1beta1.API_VERSION): (
        v1alpha1.DynamoGraphDeploymentScalingAdapter,
        _adapter_to_v1beta1,
    ),
    ("DynamoGraphDeploymentScalingAdapter", v1beta1.API_VERSION, v1alpha1.API_VERSION): (
        v1beta1.DynamoGraphDeploymentScalingAdapter,
        _adapter_to_v1alpha1,
    ),
}


def said_in_v1alpha1(graph: v1beta1.DynamoGraphDeployment) -> v1alpha1.GraphSpec:
    """What a graph written in v1alpha1 says that v1beta1 has no field for.

    Only these fields are filled: `pvcs`, and per service `serviceName`, `dynamoNamespace`,
    `autoscaling`, `ingress`. A graph written in v1beta1 gives an empty specification.
    """
    records = _records(graph.manifest()["metadata"], SAID_IN_V1ALPHA1).read
    original = _original(records.get("spec"), v1alpha1.GraphSpec, {}) or {}
    services: Json = {}
    for component in graph.spec.components:
        record = records.get(f"component/{component.name}")
        service = _original(record, v1alpha1.Service, {}) or {}
        only = {name: service[name] for name in ONLY_V1ALPHA1_SERVICE if name in service}
        if only:
            services[component.name] = only
    fields = present(pvcs=original.get("pvcs"), services=services or None)
    return v1alpha1.GraphSpec.model_validate(fields)
