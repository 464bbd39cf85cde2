"""Conversion between v1alpha1 and v1beta1, without loss in either direction.

Both versions are translated section by section: the graph's own fields, each component, the
status. What the other version cannot say, and the form in which something was said, goes into an
annotation of the converted object: the original section beside a digest of what it was translated
to. On the way back the digest tells whether the section is untouched: then the original returns as
it was; otherwise the changed section is translated afresh and only the fields that the other
version has no word for are taken from the original.

Fields with the same name and shape in both versions are always copied and belong to no record, so
a change of replicas never costs a manifest its form.

Digests are taken with defaults filled in, because the API server fills them in between.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dynamo_crds import v1alpha1, v1beta1
from dynamo_crds.pod import MAIN
from dynamo_crds.schema import Model, is_quantity, pruned, quantity_number

SAID_IN_V1ALPHA1 = "nvidia.com/dynamo-platform-v1alpha1"
"""Annotation of a v1beta1 object: what its v1alpha1 form says that v1beta1 cannot."""
SAID_IN_V1BETA1 = "nvidia.com/dynamo-platform-v1beta1"
"""Annotation of a v1alpha1 object: what its v1beta1 form says that v1alpha1 cannot."""

SIDECAR_FRONTEND = "sidecar-frontend"
GPU = "nvidia.com/gpu"

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
_ONLY_V1ALPHA1_SERVICE = ("serviceName", "dynamoNamespace", "autoscaling", "ingress")


# --- components -----------------------------------------------------------------------------------


def _present(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _component_type(service: Json) -> str | None:
    kind, sub = service.get("componentType"), service.get("subComponentType")
    if sub and kind not in ("frontend", "planner", "epp"):
        return str(sub)
    return kind if kind in v1beta1.COMPONENT_TYPES else None


def _amounts(amounts: Json) -> Json:
    result: Json = {name: amounts[name] for name in ("cpu", "memory") if name in amounts}
    if "gpu" in amounts:
        result[amounts.get("gpuType") or GPU] = amounts["gpu"]
    return {**result, **amounts.get("custom", {})}


def _resources(resources: Json) -> Json:
    result: Json = {
        side: _amounts(resources[side]) for side in ("limits", "requests") if side in resources
    }
    return {**result, **_present(claims=resources.get("claims"))}


def _merged_resources(below: Json, above: Json) -> Json:
    result = {**below, **above}
    for side in ("limits", "requests"):
        if side in below or side in above:
            result[side] = {**below.get(side, {}), **above.get(side, {})}
    return result


def _merged_by_name(below: list[Json], above: list[Json]) -> list[Json]:
    merged = {item["name"]: item for item in below}
    merged.update({item["name"]: item for item in above})
    return list(merged.values())


def _env_from(secret: str) -> Json:
    return {"secretRef": {"name": secret}}


def _main_container(service: Json, main: Json) -> Json:
    """The main container; what `mainContainer` says wins over the service's own fields."""
    container: Json = {"name": MAIN, **{key: main[key] for key in main if key != "name"}}
    if service.get("resources"):
        container["resources"] = _merged_resources(
            _resources(service["resources"]), main.get("resources", {})
        )
    if service.get("envs"):
        container["env"] = _merged_by_name(service["envs"], main.get("env", []))
    if service.get("envFromSecret"):
        container["envFrom"] = [_env_from(service["envFromSecret"]), *main.get("envFrom", [])]
    for probe in ("livenessProbe", "readinessProbe"):
        if probe in service:
            container.setdefault(probe, service[probe])
    mounts = [
        {"name": mount["name"], "mountPath": mount["mountPoint"]}
        for mount in service.get("volumeMounts", [])
        if mount.get("mountPoint") and not mount.get("useAsCompilationCache")
    ]
    if mounts:
        container["volumeMounts"] = [*mounts, *main.get("volumeMounts", [])]
    return container


def _sidecar(sidecar: Json) -> Json:
    container: Json = {"name": SIDECAR_FRONTEND, "image": sidecar["image"]}
    container.update(_present(args=sidecar.get("args"), env=sidecar.get("envs")))
    if sidecar.get("envFromSecret"):
        container["envFrom"] = [_env_from(sidecar["envFromSecret"])]
    return container


def _pod_template(service: Json) -> Json:
    extra = copy.deepcopy(service.get("extraPodSpec", {}))
    main = extra.pop("mainContainer", None)
    containers = {c["name"]: c for c in extra.pop("containers", [])}
    own_fields = ("resources", "envs", "envFromSecret", "livenessProbe", "readinessProbe")
    mounts = [
        mount["name"]
        for mount in service.get("volumeMounts", [])
        if mount.get("mountPoint") and not mount.get("useAsCompilationCache")
    ]
    if main is not None or mounts or any(service.get(name) for name in own_fields):
        beside = {**containers.pop(MAIN, {}), **(main or {})}
        containers = {MAIN: _main_container(service, beside), **containers}
    if "frontendSidecar" in service:
        containers[SIDECAR_FRONTEND] = _sidecar(service["frontendSidecar"])
    spec: Json = extra
    if containers:
        spec["containers"] = list(containers.values())
    present = {volume.get("name") for volume in spec.get("volumes", [])}
    claims = [
        {"name": name, "persistentVolumeClaim": {"claimName": name}}
        for name in dict.fromkeys(mounts)
        if name not in present
    ]
    if claims:
        spec["volumes"] = [*spec.get("volumes", []), *claims]
    metadata: Json = {}
    extra_metadata = service.get("extraPodMetadata", {})
    for name in ("annotations", "labels"):
        if name in service or name in extra_metadata:
            metadata[name] = {**service.get(name, {}), **extra_metadata.get(name, {})}
    template: Json = {}
    if metadata:
        template["metadata"] = metadata
    if spec:
        template["spec"] = spec
    return template


_TO_CAPITAL = {"intraPod": "IntraPod", "interPod": "InterPod"}
_TO_SMALL = {capital: small for small, capital in _TO_CAPITAL.items()}


def _without(data: Mapping[str, Any], *names: str) -> Json:
    return {key: value for key, value in data.items() if key not in names}


def _experimental(service: Json) -> Json:
    result: Json = {}
    if "checkpoint" in service:
        result["checkpoint"] = {"enabled": False, **service["checkpoint"]}
    failover = service.get("failover", {})
    if failover.get("enabled"):
        result["failover"] = _without(failover, "enabled")
        if "mode" in failover:
            result["failover"]["mode"] = _TO_CAPITAL[failover["mode"]]
        if "numShadows" in failover:
            result["failover"]["numShadows"] = min(failover["numShadows"], 1)
    memory = service.get("gpuMemoryService", {})
    if memory.get("enabled"):
        result["gpuMemoryService"] = _without(memory, "enabled")
        if "mode" in memory:
            result["gpuMemoryService"]["mode"] = _TO_CAPITAL[memory["mode"]]
    return result


def _component(service: Json) -> Json:
    """A service's record section as a component's."""
    result: Json = {}
    kind = _component_type(service)
    if kind is not None:
        result["type"] = kind
    template = _pod_template(service)
    if template:
        result["podTemplate"] = template
    if service.get("scalingAdapter", {}).get("enabled"):
        result["scalingAdapter"] = {}
    if "sharedMemory" in service:
        memory = service["sharedMemory"]
        result["sharedMemorySize"] = "0" if memory.get("disabled") else memory["size"]
    caches = [m for m in service.get("volumeMounts", []) if m.get("useAsCompilationCache")]
    if caches:
        result["compilationCache"] = {
            "pvcName": caches[0]["name"],
            **_present(mountPath=caches[0].get("mountPoint")),
        }
    if "frontendSidecar" in service:
        result["frontendSidecar"] = SIDECAR_FRONTEND
    config = service.get("eppConfig", {})
    if kind == "epp" and len(config) == 1:
        result["eppConfig"] = config
    experimental = _experimental(service)
    if experimental:
        result["experimental"] = experimental
    return result


def _service(component: Json) -> Json:
    """A component's record section as a service's."""
    result: Json = {}
    kind = component.get("type")
    if kind in ("prefill", "decode"):
        result.update(componentType="worker", subComponentType=kind)
    elif kind is not None:
        result["componentType"] = kind
    template = component.get("podTemplate", {})
    metadata = template.get("metadata", {})
    kept = {name: metadata[name] for name in ("annotations", "labels") if name in metadata}
    if kept:
        result["extraPodMetadata"] = kept
    spec = copy.deepcopy(template.get("spec", {}))
    containers = spec.pop("containers", [])
    others = [container for container in containers if container["name"] != MAIN]
    if len(others) < len(containers):
        main = next(container for container in containers if container["name"] == MAIN)
        spec["mainContainer"] = _without(main, "name")
    if others:
        spec["containers"] = others
    if spec:
        result["extraPodSpec"] = spec
    if "scalingAdapter" in component:
        result["scalingAdapter"] = {"enabled": True}
    size = component.get("sharedMemorySize")
    if size is not None:
        above_zero = is_quantity(size) and quantity_number(size) > 0
        result["sharedMemory"] = {"size": size} if above_zero else {"disabled": True}
    cache = component.get("compilationCache")
    if cache is not None:
        mount = {"name": cache["pvcName"], **_present(mountPoint=cache.get("mountPath"))}
        result["volumeMounts"] = [{**mount, "useAsCompilationCache": True}]
    if "eppConfig" in component:
        result["eppConfig"] = component["eppConfig"]
    experimental = component.get("experimental", {})
    if "checkpoint" in experimental:
        result["checkpoint"] = experimental["checkpoint"]
    for name in ("failover", "gpuMemoryService"):
        if name in experimental:
            setting = {"enabled": True, **experimental[name]}
            if "mode" in setting:
                setting["mode"] = _TO_SMALL[setting["mode"]]
            result[name] = setting
    return result


def _keep_v1alpha1(service: Json, original: Json) -> Json:
    """A freshly translated service with what only v1alpha1 can say, from the original."""
    return {**{n: original[n] for n in _ONLY_V1ALPHA1_SERVICE if n in original}, **service}


def _keep_v1beta1(component: Json, original: Json) -> Json:
    """A freshly translated component with what only v1beta1 can say, from the original."""
    result = copy.deepcopy(component)
    grove = original.get("experimental", {}).get("grove")
    if grove is not None:
        result.setdefault("experimental", {}).setdefault("grove", grove)
    metadata = _without(
        original.get("podTemplate", {}).get("metadata", {}), "annotations", "labels"
    )
    if metadata:
        template = result.setdefault("podTemplate", {})
        template["metadata"] = {**metadata, **template.get("metadata", {})}
    sidecar = original.get("frontendSidecar")
    containers = result.get("podTemplate", {}).get("spec", {}).get("containers", [])
    if sidecar is not None and sidecar in [container["name"] for container in containers]:
        result.setdefault("frontendSidecar", sidecar)
    return result


# --- the graph's own fields, the status -----------------------------------------------------------


def _spec_to_v1beta1(spec: Json) -> Json:
    result = _present(env=spec.get("envs"))
    topology = spec.get("topologyConstraint")
    if topology is not None:
        rest = _without(topology, "topologyProfile")
        result["topologyConstraint"] = {"clusterTopologyName": topology["topologyProfile"], **rest}
    return result


def _spec_to_v1alpha1(spec: Json) -> Json:
    result = _present(envs=spec.get("env"))
    topology = spec.get("topologyConstraint")
    if topology is not None:
        rest = _without(topology, "clusterTopologyName")
        result["topologyConstraint"] = {"topologyProfile": topology["clusterTopologyName"], **rest}
    return result


def _keep_v1alpha1_spec(spec: Json, original: Json) -> Json:
    return {**_present(pvcs=original.get("pvcs")), **spec}


def _keep_nothing(section: Json, original: Json) -> Json:
    return section


def _status_to_v1beta1(status: Json) -> Json:
    result = _without(status, "services")
    if "services" in status:
        result["components"] = {
            name: {
                **_without(replicas, "componentName"),
                "componentNames": replicas.get("componentNames") or [replicas["componentName"]],
            }
            for name, replicas in status["services"].items()
        }
    if "conditions" in status:
        result["conditions"] = list({c["type"]: c for c in status["conditions"]}.values())
    rollout = status.get("rollingUpdate", {})
    if "updatedServices" in rollout:
        rest = _without(rollout, "updatedServices")
        result["rollingUpdate"] = {**rest, "updatedComponents": rollout["updatedServices"]}
    return result


def _status_to_v1alpha1(status: Json) -> Json:
    result = _without(status, "components")
    if "components" in status:
        result["services"] = {
            name: {"componentName": next(iter(replicas.get("componentNames", [])), ""), **replicas}
            for name, replicas in status["components"].items()
        }
    rollout = status.get("rollingUpdate", {})
    if "updatedComponents" in rollout:
        rest = _without(rollout, "updatedComponents")
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
    keep: Callable[[Json, Json], Json]


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
            result = how.keep(how.forward(section), original)
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
    annotations = _without(metadata.get("annotations", {}), SAID_IN_V1ALPHA1, SAID_IN_V1BETA1)
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
    v1alpha1.Service, v1beta1.Component, _component, _service, _keep_v1beta1
)
_COMPONENT_BACK = _Translation(
    v1beta1.Component, v1alpha1.Service, _service, _component, _keep_v1alpha1
)
_SPEC_FORWARD = _Translation(
    v1alpha1.GraphSpec, v1beta1.GraphSpec, _spec_to_v1beta1, _spec_to_v1alpha1, _keep_nothing
)
_SPEC_BACK = _Translation(
    v1beta1.GraphSpec, v1alpha1.GraphSpec, _spec_to_v1alpha1, _spec_to_v1beta1, _keep_v1alpha1_spec
)
_STATUS_FORWARD = _Translation(
    v1alpha1.GraphStatus,
    v1beta1.GraphStatus,
    _status_to_v1beta1,
    _status_to_v1alpha1,
    _keep_nothing,
)
_STATUS_BACK = _Translation(
    v1beta1.GraphStatus,
    v1alpha1.GraphStatus,
    _status_to_v1alpha1,
    _status_to_v1beta1,
    _keep_nothing,
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
    spec["dgdRef"] = {**_without(spec["dgdRef"], old), new: spec["dgdRef"][old]}
    target: Json = {"apiVersion": version, "kind": source["kind"], "spec": spec}
    if "status" in source:
        forward = _Translation(
            v1alpha1.AdapterStatus,
            v1beta1.AdapterStatus,
            _adapter_status_to_v1beta1,
            _adapter_status_to_v1alpha1,
            _keep_nothing,
        )
        back = _Translation(
            forward.target, forward.source, forward.back, forward.forward, _keep_nothing
        )
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
        only = {name: service[name] for name in _ONLY_V1ALPHA1_SERVICE if name in service}
        if only:
            services[component.name] = only
    fields = _present(pvcs=original.get("pvcs"), services=services or None)
    return v1alpha1.GraphSpec.model_validate(fields)
