"""A v1alpha1 service as a v1beta1 component and back.

A service says much of its container in fields of its own (`resources`, `envs`, probes, mounts) that
a component says in its pod template; on the way back there is more than one form for the same
content. A fresh translation puts everything into `extraPodSpec`; `service_like` keeps to the form
that was there, as far as it still says the same. That matters beyond looks: server-side apply
tracks ownership by field, and a field that moves when another is edited counts as removed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from dynamo_crds import v1beta1
from dynamo_crds.pod import MAIN
from dynamo_crds.schema import is_quantity, quantity_number

Json = dict[str, Any]

SIDECAR_FRONTEND = "sidecar-frontend"
GPU = "nvidia.com/gpu"

ONLY_V1ALPHA1_SERVICE = ("serviceName", "dynamoNamespace", "autoscaling", "ingress")
"""Fields of a service that a component has no word for."""


def present(**fields: Any) -> Json:
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
    return {**result, **present(claims=resources.get("claims"))}


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
    container.update(present(args=sidecar.get("args"), env=sidecar.get("envs")))
    if sidecar.get("envFromSecret"):
        container["envFrom"] = [_env_from(sidecar["envFromSecret"])]
    return container


def _claim(name: str) -> Json:
    return {"name": name, "persistentVolumeClaim": {"claimName": name}}


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
    claims = [_claim(name) for name in dict.fromkeys(mounts) if name not in present]
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


def without(data: Mapping[str, Any], *names: str) -> Json:
    return {key: value for key, value in data.items() if key not in names}


def _experimental(service: Json) -> Json:
    result: Json = {}
    if "checkpoint" in service:
        result["checkpoint"] = {"enabled": False, **service["checkpoint"]}
    failover = service.get("failover", {})
    if failover.get("enabled"):
        result["failover"] = without(failover, "enabled")
        if "mode" in failover:
            result["failover"]["mode"] = _TO_CAPITAL[failover["mode"]]
        if "numShadows" in failover:
            result["failover"]["numShadows"] = min(failover["numShadows"], 1)
    memory = service.get("gpuMemoryService", {})
    if memory.get("enabled"):
        result["gpuMemoryService"] = without(memory, "enabled")
        if "mode" in memory:
            result["gpuMemoryService"]["mode"] = _TO_CAPITAL[memory["mode"]]
    return result


def component_of(service: Json) -> Json:
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
            **present(mountPath=caches[0].get("mountPoint")),
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


def service_of(component: Json) -> Json:
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
        spec["mainContainer"] = without(main, "name")
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
        mount = {"name": cache["pvcName"], **present(mountPoint=cache.get("mountPath"))}
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


def component_like(service: Json, original: Json) -> Json:
    """A component that says `service`, with what only a component can say from `original`."""
    result = copy.deepcopy(component_of(service))
    grove = original.get("experimental", {}).get("grove")
    if grove is not None:
        result.setdefault("experimental", {}).setdefault("grove", grove)
    metadata = without(original.get("podTemplate", {}).get("metadata", {}), "annotations", "labels")
    if metadata:
        template = result.setdefault("podTemplate", {})
        template["metadata"] = {**metadata, **template.get("metadata", {})}
    sidecar = original.get("frontendSidecar")
    containers = result.get("podTemplate", {}).get("spec", {}).get("containers", [])
    if sidecar is not None and sidecar in [container["name"] for container in containers]:
        result.setdefault("frontendSidecar", sidecar)
    return result


# --- in the form that was there -------------------------------------------------------------------


def service_like(component: Json, original: Json) -> Json:
    """A service that says `component`, in the form of `original` as far as that still fits.

    One part of the form after the other is tried, and kept if the service still says the same.
    """
    service = {
        **{name: original[name] for name in ONLY_V1ALPHA1_SERVICE if name in original},
        **service_of(component),
    }
    said = component_of(service)
    for form in _FORMS:
        attempt = copy.deepcopy(service)
        form(attempt, original)
        now = component_of(attempt)
        if now in (said, component):
            service, said = attempt, now
    return service


def _main(service: Json) -> Json:
    return dict(service.get("extraPodSpec", {}).get("mainContainer", {}))


def _put(holder: Json, name: str, value: Any) -> None:
    """Sets a field, or takes it away where nothing is left of it."""
    if value:
        holder[name] = value
    else:
        holder.pop(name, None)


def _put_main(service: Json, main: Json) -> None:
    service.setdefault("extraPodSpec", {})["mainContainer"] = main


def _type_form(service: Json, original: Json) -> None:
    for name in ("componentType", "subComponentType"):
        service.pop(name, None)
        if name in original:
            service[name] = original[name]


def _field_form(name: str) -> Callable[[Json, Json], None]:
    """A field that can say the same in more than one way, or can be absent."""

    def form(service: Json, original: Json) -> None:
        service.pop(name, None)
        if name in original:
            service[name] = original[name]

    return form


def _env_form(service: Json, original: Json) -> None:
    main = _main(service)
    names = {entry["name"] for entry in original.get("envs", [])}
    plain = {"name", "value", "valueFrom"}
    entries = main.get("env", [])
    moved = [entry for entry in entries if entry["name"] in names and entry.keys() <= plain]
    _put(service, "envs", moved)
    _put(main, "env", [entry for entry in entries if entry not in moved])
    _put_main(service, main)


def _secret_form(service: Json, original: Json) -> None:
    main, secret = _main(service), original.get("envFromSecret")
    sources = main.get("envFrom", [])
    if secret and sources[:1] == [_env_from(secret)]:
        service["envFromSecret"] = secret
        _put(main, "envFrom", sources[1:])
        _put_main(service, main)


def _resources_form(service: Json, original: Json) -> None:
    main = _main(service)
    kept: Json = {}
    rest = copy.deepcopy(main.get("resources", {}))
    said = original.get("resources", {})
    for side in ("limits", "requests"):
        if side in said and side in rest:
            _put(kept, side, _moved_amounts(said[side], rest[side]))
            _put(rest, side, rest[side])
    if "claims" in said and "claims" in rest:
        kept["claims"] = rest.pop("claims")
    _put(service, "resources", kept)
    _put(main, "resources", rest)
    _put_main(service, main)


def _moved_amounts(said: Json, found: Json) -> Json:
    """The amounts of a container that a service had in fields of its own; `found` loses them."""
    kind = said.get("gpuType") or GPU
    places = {"cpu": "cpu", "memory": "memory", "gpu": kind}
    moved = {
        name: found.pop(resource)
        for name, resource in places.items()
        if name in said and isinstance(found.get(resource), str)
    }
    if "gpu" in moved and "gpuType" in said:
        moved["gpuType"] = said["gpuType"]
    names = [name for name in said.get("custom", {}) if isinstance(found.get(name), str)]
    _put(moved, "custom", {name: found.pop(name) for name in names})
    return moved


def _probe_form(name: str) -> Callable[[Json, Json], None]:
    def form(service: Json, original: Json) -> None:
        main = _main(service)
        if name in original and name in main:
            service[name] = main.pop(name)
            _put_main(service, main)

    return form


def _mounts_form(service: Json, original: Json) -> None:
    main, pod = _main(service), service.get("extraPodSpec", {})
    caches = {mount["name"]: mount for mount in service.get("volumeMounts", [])}
    mounts, volumes = list(main.get("volumeMounts", [])), list(pod.get("volumes", []))
    kept: list[Json] = []
    for mount in original.get("volumeMounts", []):
        plain = {"name": mount["name"], "mountPath": mount.get("mountPoint")}
        claim = _claim(mount["name"])
        if mount.get("useAsCompilationCache"):
            if mount["name"] in caches:
                kept.append(caches.pop(mount["name"]))
        elif plain in mounts:
            kept.append(mount)
            mounts.remove(plain)
            if claim in volumes and claim not in original.get("extraPodSpec", {}).get(
                "volumes", []
            ):
                volumes.remove(claim)
    _put(service, "volumeMounts", [*kept, *caches.values()])
    _put(main, "volumeMounts", mounts)
    _put_main(service, main)
    _put(service["extraPodSpec"], "volumes", volumes)


def _metadata_form(service: Json, original: Json) -> None:
    extra = copy.deepcopy(service.get("extraPodMetadata", {}))
    for part in ("annotations", "labels"):
        names = original.get(part, {}).keys() - original.get("extraPodMetadata", {}).get(part, {})
        found = extra.get(part, {})
        _put(service, part, {name: found.pop(name) for name in sorted(names & found.keys())})
        _put(extra, part, found)
    _put(service, "extraPodMetadata", extra)


def _sidecar_form(service: Json, original: Json) -> None:
    containers = service.get("extraPodSpec", {}).get("containers", [])
    sidecar = next((c for c in containers if c.get("name") == SIDECAR_FRONTEND), None)
    if "frontendSidecar" not in original or sidecar is None:
        return
    secret = original["frontendSidecar"].get("envFromSecret")
    if sidecar.get("envFrom", []) != ([_env_from(secret)] if secret else []):
        return
    if not sidecar.keys() <= {"name", "image", "args", "env", "envFrom"}:
        return
    service["frontendSidecar"] = present(
        image=sidecar.get("image"),
        args=sidecar.get("args"),
        envs=sidecar.get("env"),
        envFromSecret=secret,
    )
    # One that the author wrote out as well holds its place, and says nothing.
    written = original.get("extraPodSpec", {}).get("containers", [])
    idle = [c for c in written if c.get("name") == SIDECAR_FRONTEND]
    kept = [each for c in containers for each in (idle if c is sidecar else [c])]
    _put(service["extraPodSpec"], "containers", kept)


def _empty_form(service: Json, original: Json) -> None:
    """No empty objects where there were none."""
    pod, before = service.get("extraPodSpec", {}), original.get("extraPodSpec", {})
    if pod.get("mainContainer") == {} and "mainContainer" not in before:
        del pod["mainContainer"]
    if not pod and "extraPodSpec" not in original:
        service.pop("extraPodSpec", None)


_FORMS: tuple[Callable[[Json, Json], None], ...] = (
    _type_form,
    _sidecar_form,
    _env_form,
    _secret_form,
    _resources_form,
    _probe_form("livenessProbe"),
    _probe_form("readinessProbe"),
    _mounts_form,
    _metadata_form,
    *(
        _field_form(name)
        for name in (
            *("scalingAdapter", "sharedMemory", "eppConfig"),
            *("checkpoint", "failover", "gpuMemoryService"),
        )
    ),
    _empty_form,
)
