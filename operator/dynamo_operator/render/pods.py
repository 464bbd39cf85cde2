"""From a component to its pod template: defaults, what the author wrote, what runs.

Order of the merge, the later one winning: the type's defaults · the author's `main` · the mapped
image and command. Variables: the platform's · the graph's `env` · the component's. Pod fields:
defaults · the author's. Other containers stay as they are.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_crds.v1beta1 import Component

from dynamo_operator.render import (
    environment,
    hardening,
    merge,
    models,
    multinode,
    names,
    notes,
    pullsecrets,
    runtimes,
)
from dynamo_operator.render.defaults import epp, frontend, planner, worker
from dynamo_operator.render.defaults.ports import Numbers, References
from dynamo_operator.render.environment import field, variable
from dynamo_operator.render.merge import Json, entries, mapping
from dynamo_operator.render.multinode.node import ALIASES
from dynamo_operator.render.notes import Notes
from dynamo_operator.render.parts import WORKER_ROLES, Graph, Part
from dynamo_operator.render.runtimes import Family, Runtime

MAIN = "main"
SIDECAR_FRONTEND = "sidecar-frontend"
SHARED_MEMORY = "shared-memory"
SHARED_MEMORY_PATH = "/dev/shm"
COMPILATION_CACHE = "compilation-cache"
GRACE_MARGIN_SECONDS = 30
"""Between the end of the drain and SIGKILL: time to stop the engine."""
MIN_DRAIN_SECONDS = 5
DRAIN_VARIABLE = "DYN_DRAIN_SECONDS"

_RESERVED = (
    names.GRAPH_LABEL,
    names.COMPONENT_LABEL,
    names.TYPE_LABEL,
    names.CLASS_LABEL,
    names.WORKER_HASH_LABEL,
)
"""Labels by which pods are found: the author's values of these don't count."""

_ZERO = re.compile(r"[+-]?0*(?:\.0*)?[A-Za-z]*")

_POD_FIELDS = (
    field("POD_NAME", "metadata.name"),
    field("POD_NAMESPACE", "metadata.namespace"),
    field("POD_IP", "status.podIP"),
    field("POD_UID", "metadata.uid"),
)


def part(component: Component, graph: Graph, noted: Notes) -> Part:
    """`component` with its pod template rendered."""
    written = mapping(component.pod_template)
    pod = mapping(written.get("spec"))
    containers = entries(pod.get("containers"))
    user: Mapping[str, Any] = next((c for c in containers if _name(c) == MAIN), {})
    declared = component.type or ""
    runtime = runtimes.resolve(
        component.name, declared, user, graph.spec.backend_framework, graph.platform, noted
    )
    kind, role = _kind_and_role(component.name, declared, runtime, noted)
    family = runtime.family

    user_env = entries(user.get("env"))
    both_envs = [*graph.env, *user_env]
    numbers = Numbers(
        http=environment.number(both_envs, "DYN_HTTP_PORT", names.HTTP_PORT),
        system=environment.number(both_envs, "DYN_SYSTEM_PORT", names.SYSTEM_PORT),
        stream=environment.number(both_envs, "DYN_STREAM_PORT", names.STREAM_PORT),
    )
    grace, drain = _grace(component.name, kind, pod, both_envs, graph, noted)
    volumes: list[Json] = []
    mounts: list[Json] = []
    variables = _variables(component, kind, role, family, numbers, drain, graph)
    _shared_memory(component, kind, user, graph, volumes, mounts)
    _compilation_cache(component, runtime, volumes, mounts, variables)
    _scratch(runtime, user, graph, volumes, mounts, variables)
    _picker_config(component, graph, volumes, mounts, variables)
    aliases = ALIASES if component.multinode is not None else ()

    own_ports = _ports(kind, family, numbers)
    _note_taken_ports(component.name, own_ports, entries(user.get("ports")), noted)
    ports = merge.ports(own_ports, entries(user.get("ports")))
    refer = References.of(ports)
    defaults: Json = {
        "name": MAIN,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **_probes(kind, family, numbers, refer),
    }
    if runtime.own_image:
        defaults["securityContext"] = hardening.security_context(
            runtime.own_image, pod, graph.platform.read_only_root
        )
    if mounts:
        defaults["volumeMounts"] = mounts
    main = merge.container(defaults, user)
    if ports:
        main["ports"] = ports
    main["env"] = environment.merged([*aliases, *variables], graph.env, user_env, aliases)
    for key, value in (
        ("image", runtime.image),
        ("command", runtime.command),
        ("args", runtime.args),
    ):
        if value is None:
            main.pop(key, None)
        else:
            main[key] = value

    dropped = _sidecar_frontends(component, kind, containers, noted)
    pod_defaults: Json = {"securityContext": {"fsGroup": 1000}}
    if grace is not None:
        pod_defaults["terminationGracePeriodSeconds"] = grace
    if volumes:
        pod_defaults["volumes"] = volumes
    account = pod.get("serviceAccountName") or pod.get("serviceAccount") or ""
    own_account = not account and kind in ("frontend", "epp", "planner")
    if own_account:
        account = names.object_name(graph.name, component.name)
        pod_defaults["serviceAccountName"] = account
    elif not account and kind == "worker":
        # Workers ask Kubernetes for nothing; without a token nobody can in their name.
        pod_defaults["automountServiceAccountToken"] = False
    spec = merge.pod_spec(pod_defaults, pod)
    spec["containers"] = [
        main if container is user else container
        for container in containers
        if container not in dropped
    ]
    if not user:
        spec["containers"].insert(0, main)
    _install_images(spec, graph)
    discover = graph.setting(names.PULL_SECRETS_ANNOTATION, component) != "true"
    pull_secrets = pullsecrets.of_pod(spec, graph.platform, discover)
    if pull_secrets and spec.get("imagePullSecrets") is None:
        spec["imagePullSecrets"] = pull_secrets
    _claims_for_mounts(component.name, spec, noted)

    labels = _labels(component, kind, role, graph)
    metadata = mapping(written.get("metadata"))
    template: Json = {
        **merge.present(written),
        "metadata": {
            **merge.present(metadata),
            "labels": _pod_labels(component, mapping(metadata.get("labels")), labels, graph, noted),
        },
        "spec": spec,
    }
    annotations = {
        **models.annotations(component),
        **graph.spec.annotations,
        **merge.present(mapping(metadata.get("annotations"))),
    }
    if annotations:
        template["metadata"]["annotations"] = annotations
    templates: Mapping[str, Json] = {"pod": template}
    every_node_serves = True
    if component.multinode is not None:
        executor = graph.setting(names.EXECUTOR_ANNOTATION, component).lower()
        backend = graph.spec.backend_framework
        group = multinode.split(component, template, main, executor, backend, noted)
        templates, every_node_serves = group.templates, group.every_node_serves
    return Part(
        spec=component,
        kind=kind,
        role=role,
        family=family,
        templates=templates,
        every_node_serves=every_node_serves,
        labels=labels,
        ports={
            entry["name"]: entry["containerPort"]
            for entry in ports
            if isinstance(entry, dict) and entry.get("name")
        },
        service_ports=_service_ports(kind, family, numbers, refer),
        service_account=account,
        own_account=own_account,
    )


def _name(container: Any) -> Any:
    return mapping(container).get("name")


def _kind_and_role(
    component: str, declared: str, runtime: Runtime, noted: Notes
) -> tuple[str, str]:
    """Kind and role. The declared type wins; flags tell the role of a plain worker."""
    kind = "worker" if declared in WORKER_ROLES else declared
    if not kind and runtime.type:
        kind = runtime.type
        noted.add(component, notes.TYPE_INFERRED, f"no type given; what it runs is a {kind}")
    if kind != "worker":
        return kind, kind
    if declared in ("prefill", "decode"):
        if runtime.role not in (None, "worker", declared):
            message = f"type {declared}, but its flags say {runtime.role}; the type counts"
            noted.add(component, notes.ROLE_CONFLICT, message)
        return kind, declared
    return kind, runtime.role or "worker"


def _grace(
    component: str,
    kind: str,
    pod: Mapping[str, Any],
    env: Sequence[Mapping[str, Any]],
    graph: Graph,
    noted: Notes,
) -> tuple[int | None, int | None]:
    """Default grace period (None where the author gave one) and drain limit, in seconds."""
    given = pod.get("terminationGracePeriodSeconds")
    if kind == "planner":
        return (planner.GRACE_SECONDS if given is None else None), None
    if not kind:
        return None, None
    if isinstance(given, int):
        drain = max(MIN_DRAIN_SECONDS, given - GRACE_MARGIN_SECONDS)
        wanted = environment.number(env, DRAIN_VARIABLE, drain)
        if max(wanted, drain) > given:
            message = (
                f"requests may take {max(wanted, drain)} s to finish, but"
                f" terminationGracePeriodSeconds {given} ends the pod before"
            )
            noted.add(component, notes.DRAIN_EXCEEDS_GRACE, message)
        return None, drain
    drain = environment.number(env, DRAIN_VARIABLE, graph.platform.drain_seconds)
    return drain + GRACE_MARGIN_SECONDS, drain


def _variables(
    component: Component,
    kind: str,
    role: str,
    family: Family,
    numbers: Numbers,
    drain: int | None,
    graph: Graph,
) -> list[Json]:
    """The platform's variables of the main container."""
    shared = bool(component.global_dynamo_namespace)
    namespace = names.dynamo_namespace(graph.namespace, graph.name, shared)
    found = [
        *_POD_FIELDS,
        variable("DYN_NAMESPACE", namespace),
        variable("DYN_COMPONENT", component.name),
        variable("DYN_PARENT_DGD_K8S_NAME", graph.name),
        variable("DYN_PARENT_DGD_K8S_NAMESPACE", graph.namespace),
        variable("DYN_DISCOVERY_BACKEND", "kubernetes"),
    ]
    if role:
        found.append(variable("DYN_COMPONENT_TYPE", role))
    match kind:
        case "frontend":
            found += frontend.environment(numbers)
            if family is Family.FOREIGN:
                found += frontend.foreign_environment(numbers, namespace)
        case "worker":
            found += worker.environment(family, numbers)
        case "planner":
            found += planner.environment(numbers)
        case "epp":
            found += epp.environment(numbers, names.pool_name(graph.name))
    if drain is not None:
        found.append(variable(DRAIN_VARIABLE, str(drain)))
    return found


def _ports(kind: str, family: Family, numbers: Numbers) -> list[Json]:
    match kind:
        case "frontend":
            return frontend.ports(numbers)
        case "worker":
            return worker.ports(family, numbers)
        case "planner":
            return planner.ports(numbers)
        case "epp":
            return epp.ports(numbers)
    return []


def _probes(kind: str, family: Family, numbers: Numbers, refer: References) -> Json:
    match kind:
        case "frontend":
            return frontend.probes(numbers, refer)
        case "worker":
            return worker.probes(family, numbers, refer)
        case "planner":
            return planner.probes(numbers, refer)
        case "epp":
            return epp.probes(numbers, refer)
    return {}


def _service_ports(
    kind: str, family: Family, numbers: Numbers, refer: References
) -> list[tuple[str, str | int, int]]:
    """Ports of the component's Service. Workers show their status server only: an engine's HTTP
    has admin routes, and requests reach it through a picker."""
    http = ("http", refer("http", numbers.http), names.HTTP_PORT)
    system = ("system", refer("system", numbers.system), names.SYSTEM_PORT)
    match kind:
        case "frontend":
            return [http, system] if family is not Family.FOREIGN else [http]
        case "worker":
            return [http] if family is Family.STOCK else [system]
        case "planner":
            port = names.PLANNER_METRICS_PORT
            return [("metrics", refer("metrics", port), port), system]
        case "epp":
            port = names.EXT_PROC_PORT
            return [("grpc", refer("grpc", port), port), system]
    return []


def _mounted(user: Mapping[str, Any], path: str) -> bool:
    """Whether the author mounts something at `path`."""
    taken = (mapping(m).get("mountPath") for m in entries(user.get("volumeMounts")))
    return any(isinstance(one, str) and one.rstrip("/") == path for one in taken)


def _shared_memory(
    component: Component,
    kind: str,
    user: Mapping[str, Any],
    graph: Graph,
    volumes: list[Json],
    mounts: list[Json],
) -> None:
    size = component.shared_memory_size
    if size is None:
        if kind != "worker":
            return
        size = graph.platform.shared_memory_size
    text = str(size)
    if _ZERO.fullmatch(text):
        return
    if _mounted(user, SHARED_MEMORY_PATH):
        return
    volumes.append({"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": text}})
    mounts.append({"name": SHARED_MEMORY, "mountPath": SHARED_MEMORY_PATH})


def _scratch(
    runtime: Runtime,
    user: Mapping[str, Any],
    graph: Graph,
    volumes: list[Json],
    mounts: list[Json],
    variables: list[Json],
) -> None:
    if not runtime.own_image or not hardening.has_scratch(
        runtime.own_image, graph.platform.read_only_root
    ):
        return
    variables.append(variable("HOME", hardening.SCRATCH))
    if not _mounted(user, hardening.SCRATCH):
        volumes.append({"name": hardening.SCRATCH_VOLUME, "emptyDir": {}})
        mounts.append({"name": hardening.SCRATCH_VOLUME, "mountPath": hardening.SCRATCH})


def _compilation_cache(
    component: Component,
    runtime: Runtime,
    volumes: list[Json],
    mounts: list[Json],
    variables: list[Json],
) -> None:
    cache = component.compilation_cache
    if cache is None:
        return
    own = bool(runtime.own_image)
    path = cache.mount_path or (worker.OWN_COMPILATION_CACHE if own else worker.COMPILATION_CACHE)
    claim = {"claimName": cache.pvc_name}
    volumes.append({"name": COMPILATION_CACHE, "persistentVolumeClaim": claim})
    mounts.append({"name": COMPILATION_CACHE, "mountPath": path})
    variables.append(variable("VLLM_CACHE_ROOT", path))


def _picker_config(
    component: Component,
    graph: Graph,
    volumes: list[Json],
    mounts: list[Json],
    variables: list[Json],
) -> None:
    config = component.epp_config
    if config is None:
        return
    if config.config_map_ref is not None:
        source: Json = {
            "name": config.config_map_ref.name,
            "items": [{"key": config.config_map_ref.key, "path": epp.CONFIG_FILE}],
        }
        if config.config_map_ref.optional is not None:
            source["optional"] = config.config_map_ref.optional
    else:
        source = {"name": names.object_name(graph.name, component.name)}
    volumes.append({"name": epp.CONFIG_VOLUME, "configMap": source})
    mounts.append({"name": epp.CONFIG_VOLUME, "mountPath": epp.CONFIG_FOLDER, "readOnly": True})
    variables.append(variable("DYN_EPP_CONFIG_FILE", f"{epp.CONFIG_FOLDER}/{epp.CONFIG_FILE}"))


def _sidecar_frontends(
    component: Component, kind: str, containers: Sequence[Any], noted: Notes
) -> list[Any]:
    """Frontends beside a worker's engine: our picker does their job."""
    if kind != "worker":
        return []
    wanted = {SIDECAR_FRONTEND, component.frontend_sidecar} - {MAIN, None}
    dropped = [container for container in containers if _name(container) in wanted]
    for container in dropped:
        noted.add(
            component.name,
            notes.FRONTEND_SIDECAR_REPLACED,
            f"container {_name(container)} is left out: the picker sends requests to the engine"
            " itself",
        )
    return dropped


def _install_images(spec: Json, graph: Graph) -> None:
    """Which of our images containers beside the main one run, where they leave that open."""
    for key in ("containers", "initContainers"):
        if found := entries(spec.get(key)):
            spec[key] = [_installed(container, graph) for container in found]


def _installed(container: Any, graph: Graph) -> Any:
    written = mapping(container).get("image")
    image = runtimes.installed(written, graph.platform)
    return container if image == written else {**container, "image": image}


def _note_taken_ports(
    component: str, own: Sequence[Json], user: Sequence[Any], noted: Notes
) -> None:
    numbers = {port["name"]: port["containerPort"] for port in own}
    for port in user:
        given = mapping(port)
        name, number = given.get("name"), given.get("containerPort")
        if name in numbers and number != numbers[name]:
            message = (
                f"port {name} is {number} as written, and probes and Services follow it; the"
                f" program itself listens on {numbers[name]} unless its variables say otherwise"
            )
            noted.add(component, notes.PORT_TAKEN, message)


def _claims_for_mounts(component: str, spec: Json, noted: Notes) -> None:
    """A volume for every mount that has none: the PersistentVolumeClaim of that name."""
    volumes = entries(spec.get("volumes"))
    known = {_name(volume) for volume in volumes}
    missing: dict[str, None] = {}
    for key in ("containers", "initContainers"):
        for container in entries(spec.get(key)):
            for mount in entries(mapping(container).get("volumeMounts")):
                name = _name(mount)
                if isinstance(name, str) and name not in known:
                    missing[name] = None
    for name in missing:
        message = f"no volume is named {name}: the PersistentVolumeClaim {name} is mounted"
        noted.add(component, notes.CLAIM_ASSUMED, message)
    if missing:
        spec["volumes"] = volumes + [
            {"name": name, "persistentVolumeClaim": {"claimName": name}} for name in missing
        ]


def _labels(component: Component, kind: str, role: str, graph: Graph) -> dict[str, str]:
    """Labels that say what an object belongs to."""
    labels = {**graph.label, names.COMPONENT_LABEL: component.name}
    if role:
        labels[names.TYPE_LABEL] = role
    if kind == "worker":
        labels[names.CLASS_LABEL] = "worker"
        if role != "worker":
            labels[names.SUB_TYPE_LABEL] = role
    return labels


def _pod_labels(
    component: Component,
    user: Mapping[str, Any],
    own: Mapping[str, str],
    graph: Graph,
    noted: Notes,
) -> dict[str, Any]:
    shared = own.get(names.TYPE_LABEL) is not None
    namespace = names.bounded(names.dynamo_namespace(graph.namespace, graph.name, False))
    labels: dict[str, Any] = {**own, names.NAMESPACE_LABEL: namespace, **models.labels(component)}
    if shared and graph.wants_metrics:
        labels[names.METRICS_LABEL] = "true"
    labels |= graph.spec.labels
    labels |= merge.present(user)
    for label in _RESERVED:
        mine = own.get(label)
        given = labels.get(label)
        if given is not None and given != mine:
            message = f"label {label}: {given} is replaced; pods are found by it"
            noted.add(component.name, notes.LABEL_RESERVED, message)
        if mine is not None:
            labels[label] = mine
        else:
            labels.pop(label, None)
    return labels
