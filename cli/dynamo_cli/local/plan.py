"""What will run: rendered manifests in, pods as plain data out, or every reason why not.

Pure but for looking whether programs and folders exist on this machine. All refusals of a file are
collected before anything starts, so that a user mends them in one go.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_cli.local import images, volumes
from dynamo_cli.local.expand import Objects, Unresolved, secret_data
from dynamo_cli.local.probes import Action, InvalidProbe, Kind, Probe, parse_action, parse_probe

COMPONENT_LABEL = "nvidia.com/dynamo-component"
TYPE_LABEL = "nvidia.com/dynamo-component-type"
GENERATION_LABEL = "nvidia.com/dynamo-worker-hash"
ENGINE_ROLES = ("worker", "prefill", "decode")

HTTP_PORT = 8000
DEFAULT_GRACE_S = 30.0  # Kubernetes' terminationGracePeriodSeconds


class Stage(enum.Enum):
    """When a container of a pod runs."""

    INIT = "init"  # once, before the next one starts
    SIDECAR = "sidecar"  # a restartable init container: from its place in the row to the pod's end
    MAIN = "main"


@dataclass(frozen=True, slots=True)
class Sleep:
    """A lifecycle hook that only waits."""

    seconds: float


Hook = Action | Sleep


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """One container of a pod template."""

    name: str
    stage: Stage
    program: images.Program
    raw: Mapping[str, Any]  # the manifest, for env, envFrom and resources
    mounts: tuple[volumes.Mount, ...] = ()
    probes: tuple[Probe, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)  # name -> number, TCP only
    pre_stop: Hook | None = None
    post_start: Hook | None = None
    working_dir: str = ""
    restarts: bool = True  # False: an init container of a pod that never restarts


@dataclass(frozen=True, slots=True)
class PodPlan:
    """A Deployment: what its pods are made of, and how many there are."""

    deployment: str
    replicas: int
    component_type: str  # frontend, worker, prefill, decode, planner, epp; "" if unlabelled
    containers: tuple[ContainerPlan, ...]  # init containers first, in order
    volumes: tuple[volumes.Volume, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    service_account: str = "default"
    grace_s: float = DEFAULT_GRACE_S

    @property
    def is_engine(self) -> bool:
        return self.component_type in ENGINE_ROLES

    @property
    def ports(self) -> dict[str, int]:
        """All named and numbered TCP ports of the pod."""
        return {name: port for c in self.containers for name, port in c.ports.items()}

    @property
    def http_port(self) -> int:
        return self.ports.get("http", HTTP_PORT)


@dataclass(frozen=True, slots=True)
class Plan:
    """All pods of a graph, the frontend's first."""

    pods: tuple[PodPlan, ...]
    objects: Objects
    namespace: str
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)  # scaling adapter -> Deployment


class Refusals(Exception):
    """Why a file can't run as processes: one line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


# Kinds that change nothing for pods as processes: their job is done by the runner itself.
SILENT_KINDS = frozenset({
    "ConfigMap", "Secret", "Service", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy",
    "PodDisruptionBudget", "PodMonitor", "DynamoGraphDeployment",
})  # fmt: skip


def make_plan(
    manifests: Iterable[Mapping[str, Any]],
    *,
    namespace: str,
    environ: Mapping[str, str],
) -> Plan:
    """Plan the pods of rendered ``manifests`` (and of ConfigMaps and Secrets beside the graph).

    ``environ`` is the caller's environment. Raises ``Refusals``.
    """
    refusals: list[str] = []
    notes: list[str] = []
    config_maps: dict[str, Mapping[str, str]] = {}
    secrets: dict[str, Mapping[str, str]] = {}
    deployments: list[Mapping[str, Any]] = []
    adapters: dict[str, str] = {}  # name -> component
    for manifest in manifests:
        kind = str(manifest.get("kind", ""))
        name = str((manifest.get("metadata") or {}).get("name", ""))
        if kind == "ConfigMap":
            if manifest.get("binaryData"):
                notes.append(f"ConfigMap {name!r}: binaryData is left out")
            config_maps[name] = {k: str(v) for k, v in (manifest.get("data") or {}).items()}
        elif kind == "Secret":
            try:
                secrets[name] = secret_data(manifest)
            except Unresolved as error:
                refusals.append(str(error))
        elif kind == "Deployment":
            deployments.append(manifest)
        elif kind == "DynamoGraphDeploymentScalingAdapter":
            adapters[name] = str(manifest["spec"]["dgdRef"]["componentName"])
        elif kind in ("LeaderWorkerSet", "PodCliqueSet", "StatefulSet", "Job", "DaemonSet"):
            refusals.append(f"{kind} {name!r} can't run as processes; only Deployments can")
        elif kind not in SILENT_KINDS:
            notes.append(f"{kind} {name!r} has no meaning on one machine and is left out")
    objects = Objects(config_maps, secrets, environ)
    pods = [_pod(manifest, objects, environ, refusals, notes) for manifest in deployments]
    if not pods and not refusals:
        refusals.append("nothing to run: the graph has no component")
    refusals += _shared_sockets(pods)
    if refusals:
        raise Refusals(list(dict.fromkeys(refusals)))
    pods.sort(key=lambda pod: pod.component_type != "frontend")  # stable: file order otherwise
    of_component = {pod.labels.get(COMPONENT_LABEL): pod.deployment for pod in pods}
    return Plan(
        tuple(pods),
        objects,
        namespace,
        tuple(dict.fromkeys(notes)),
        {
            name: of_component[component]
            for name, component in adapters.items()
            if component in of_component
        },
    )


def _pod(
    manifest: Mapping[str, Any],
    objects: Objects,
    environ: Mapping[str, str],
    refusals: list[str],
    notes: list[str],
) -> PodPlan:
    name = str(manifest["metadata"]["name"])
    spec: Mapping[str, Any] = manifest.get("spec") or {}
    template: Mapping[str, Any] = spec.get("template") or {}
    metadata: Mapping[str, Any] = template.get("metadata") or {}
    pod_spec: Mapping[str, Any] = template.get("spec") or {}
    labels = {k: str(v) for k, v in (metadata.get("labels") or {}).items()}
    raw_containers = [
        (Stage.SIDECAR if raw.get("restartPolicy") == "Always" else Stage.INIT, raw)
        for raw in pod_spec.get("initContainers") or ()
    ] + [(Stage.MAIN, raw) for raw in pod_spec.get("containers") or ()]

    known: dict[str, volumes.Volume] = {}
    refused: set[str] = set()
    for raw in pod_spec.get("volumes") or ():
        if not _needed(str(raw.get("name", "")), raw_containers):
            continue
        try:
            volume = volumes.parse_volume(raw, objects.config_maps)
            known[volume.name] = volume
        except volumes.Refused as error:
            refused.add(str(raw.get("name", "")))
            refusals.append(f"{name}: {error}")

    containers: list[ContainerPlan] = []
    for stage, raw in raw_containers:
        where = f"{name}, container {raw.get('name')!r}"
        try:
            containers.append(_container(stage, raw, known, refused, environ, where, notes))
        except (volumes.Refused, images.ForeignImage, InvalidProbe) as error:
            refusals.append(f"{where}: {error}")
        except images.MissingEngine as error:
            refusals.append(str(error))
    grace = pod_spec.get("terminationGracePeriodSeconds")
    return PodPlan(
        deployment=name,
        replicas=int(spec.get("replicas", 1)),
        component_type=labels.get(TYPE_LABEL, ""),
        containers=tuple(containers),
        volumes=tuple(known.values()),
        labels=labels,
        annotations={k: str(v) for k, v in (metadata.get("annotations") or {}).items()},
        service_account=str(pod_spec.get("serviceAccountName") or "default"),
        grace_s=DEFAULT_GRACE_S if grace is None else float(grace),
    )


def _needed(volume: str, containers: Iterable[tuple[Stage, Mapping[str, Any]]]) -> bool:
    """Whether a volume is mounted anywhere but at /dev/shm, which the machine already has."""
    return any(
        mount.get("name") == volume and mount.get("mountPath") != "/dev/shm"
        for _, raw in containers
        for mount in raw.get("volumeMounts") or ()
    )


def _texts(raw: Mapping[str, Any]) -> list[str]:
    """All that a container's manifest tells its program: command, args, env, probes, workingDir."""
    told = [raw.get(k) for k in ("command", "args", "env", "workingDir", "lifecycle",
                                 "startupProbe", "livenessProbe", "readinessProbe")]  # fmt: skip
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(told)
    return found


def _container(
    stage: Stage,
    raw: Mapping[str, Any],
    known: Mapping[str, volumes.Volume],
    refused: set[str],
    environ: Mapping[str, str],
    where: str,
    notes: list[str],
) -> ContainerPlan:
    program = images.program(
        str(raw.get("image") or ""),
        [str(part) for part in raw.get("command") or ()],
        [str(part) for part in raw.get("args") or ()],
        environ,
    )
    mounts: list[volumes.Mount] = []
    for raw_mount in raw.get("volumeMounts") or ():
        mount = volumes.parse_mount(raw_mount)
        if mount.volume in refused:
            continue
        volume = known.get(mount.volume)
        if volume is None:
            if mount.path == "/dev/shm":
                notes.append(volumes.SHARED_MEMORY_NOTE)
                continue
            raise volumes.Refused(f"volume {mount.volume!r} at {mount.path} is not in the pod")
        note = volumes.check_mount(mount, volume, _texts(raw))
        if note:
            notes.append(note if note == volumes.SHARED_MEMORY_NOTE else f"{where}: {note}")
        if mount.path != "/dev/shm":
            mounts.append(mount)
    if raw.get("volumeDevices"):
        raise volumes.Refused("volumeDevices need a cluster's storage")
    ports = {
        str(port.get("name") or port["containerPort"]): int(port["containerPort"])
        for port in raw.get("ports") or ()
        if port.get("protocol", "TCP") == "TCP"
    }
    probes = tuple(
        parse_probe(kind, raw[key], ports, f"{key}")
        for kind in Kind
        if raw.get(key := f"{kind.value}Probe")
    )
    gpus = ((raw.get("resources") or {}).get("limits") or {}).get("nvidia.com/gpu")
    if gpus not in (None, 0, "0"):
        notes.append(f"{where}: asks for {gpus} GPU; a process gets what the machine has")
    lifecycle: Mapping[str, Any] = raw.get("lifecycle") or {}
    return ContainerPlan(
        name=str(raw["name"]),
        stage=stage,
        program=program,
        raw=raw,
        mounts=tuple(mounts),
        probes=probes if stage is not Stage.INIT else (),
        ports=ports,
        pre_stop=_hook(lifecycle.get("preStop"), ports, "lifecycle.preStop"),
        post_start=_hook(lifecycle.get("postStart"), ports, "lifecycle.postStart"),
        working_dir=str(raw.get("workingDir") or ""),
    )


def _hook(raw: Mapping[str, Any] | None, ports: Mapping[str, int], where: str) -> Hook | None:
    if not raw:
        return None
    if sleep := raw.get("sleep"):
        return Sleep(float(sleep.get("seconds", 0)))
    return parse_action(raw, ports, where)


def _shared_sockets(pods: Sequence[PodPlan]) -> list[str]:
    """Stock engines whose KV events would all bind the same port on every address.

    vLLM binds an endpoint only if it has a wildcard (or is ipc), and a wildcard is not one pod's
    address: the second engine could not start.
    """
    stock = [(pod, c) for pod in pods for c in pod.containers if c.program.stock_engine]
    if sum(pod.replicas for pod, _ in stock) < 2:
        return []
    found: list[str] = []
    for pod, container in stock:
        for part in container.program.argv:
            config = part.partition("=")[2] if part.startswith("--kv-events-config=") else part
            if not config.startswith("{") or "endpoint" not in config:
                continue
            try:
                endpoints = [v for k, v in json.loads(config).items() if k.endswith("endpoint")]
            except ValueError:
                continue
            found += [
                f"{pod.deployment}, container {container.name!r}: KV events on {endpoint} would be "
                "one port for all pods of this machine; use ipc:// and a path in an emptyDir"
                for endpoint in endpoints
                if str(endpoint).startswith("tcp://*")
            ]
    return found
