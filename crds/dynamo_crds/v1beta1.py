"""Version v1beta1, the one that is stored: graphs as a list of components with pod templates.

The field set, limits, defaults and rules are those of NVIDIA Dynamo's CRDs, so that manifests
written for Dynamo are accepted unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dynamo_crds.parts import (
    MIN_AVAILABLE_RULES,
    RESTART_UNSET_ON_CREATE,
    Backend,
    Checkpoint,
    CheckpointStatus,
    Condition,
    ConfigMapKey,
    EnvVar,
    GraphExperimental,
    GraphState,
    MemoryServiceClientPod,
    Metadata,
    ModelRef,
    Multinode,
    PickerConfig,
    PlacementStatus,
    ProviderOverride,
    ReplicaStatus,
    Restart,
    RestartStatus,
    RolloutPhase,
    RuntimeVersion,
    TopologyPack,
)
from dynamo_crds.pod import PodTemplate
from dynamo_crds.schema import (
    LIST_SET,
    Bool,
    Count,
    DnsLabel,
    Int64,
    Model,
    Positive,
    Quantity,
    RawObject,
    Resource,
    Rule,
    StringMap,
    Text,
    Time,
    TopologyDomain,
    Violation,
    list_map,
)

GROUP = "nvidia.com"
VERSION = "v1beta1"
API_VERSION: Literal["nvidia.com/v1beta1"] = "nvidia.com/v1beta1"

ComponentType = Literal["frontend", "worker", "prefill", "decode", "planner", "epp"]
COMPONENT_TYPES: tuple[ComponentType, ...] = (
    "frontend",
    "worker",
    "prefill",
    "decode",
    "planner",
    "epp",
)


class CompilationCache(Model):
    """A volume for the engine's compiled kernels."""

    pvc_name: Text
    """PersistentVolumeClaim that holds the cache."""
    mount_path: str | None = None
    """Where it is mounted; the engine's own cache directory by default."""


def _one_picker_config(data: Any) -> Iterator[Violation]:
    if (data.get("configMapRef") is None) == (data.get("config") is None):
        yield Violation((), sorted(data), "exactly one of configMapRef and config")


class EppConfig(Model):
    """Configuration of Dynamo's own endpoint picker; ours takes none of it."""

    config_map_ref: ConfigMapKey | None = None
    """ConfigMap that holds the configuration."""
    config: Annotated[dict[str, Any], RawObject(PickerConfig)] | None = None
    """The configuration itself, kept as written."""

    rules = (
        Rule(
            "exactly one of configMapRef or config must be specified",
            "has(self.configMapRef) != has(self.config)",
            check=_one_picker_config,
        ),
    )


class ComponentCheckpoint(Checkpoint):
    """Start of a worker from a snapshot of a warm one."""

    enabled: Bool
    """Whether checkpoints are used."""


class Failover(Model):
    """Standby engines."""

    mode: Literal["IntraPod", "InterPod"] = "IntraPod"
    """Where the standby runs."""
    num_shadows: Annotated[Positive, Field(le=1)] = 1
    """Number of standbys."""


def _intra_pod_clients(data: Any) -> Iterator[Violation]:
    if data.get("extraClientContainers") and data.get("mode", "IntraPod") != "IntraPod":
        yield Violation(
            ("extraClientContainers",), data["extraClientContainers"], "absent, or mode: IntraPod"
        )


def _no_client_pods(data: Any) -> Iterator[Violation]:
    if data.get("extraClientPods"):
        yield Violation(("extraClientPods",), data["extraClientPods"], "absent")


class GpuMemoryService(Model):
    """GPU memory shared between an engine and its neighbours."""

    mode: Literal["IntraPod", "InterPod"] = "IntraPod"
    """Who shares."""
    device_class_name: str = "gpu.nvidia.com"
    """Device class of the claim."""
    extra_client_containers: Annotated[list[DnsLabel], Field(json_schema_extra=LIST_SET)] = Field(
        default_factory=list
    )
    """Further containers that use the memory."""
    extra_client_pods: Annotated[
        list[MemoryServiceClientPod], Field(json_schema_extra=list_map("name"))
    ] = Field(default_factory=list)
    """Reserved."""

    rules = (
        Rule(
            "extraClientContainers is only supported with mode=IntraPod",
            "!has(self.extraClientContainers) || size(self.extraClientContainers) == 0"
            " || self.mode == 'IntraPod'",
            check=_intra_pod_clients,
        ),
        Rule(
            "extraClientPods is reserved and not implemented",
            "!has(self.extraClientPods) || size(self.extraClientPods) == 0",
            check=_no_client_pods,
        ),
    )


class Grove(Model):
    """Settings for the Grove provider."""

    force_scaling_group: Bool | None = None
    """Whether a single-node component gets a scaling group."""


class ComponentExperimental(Model):
    """Settings of a component whose shape may still change."""

    checkpoint: ComponentCheckpoint | None = None
    """Start from a snapshot."""
    failover: Failover | None = None
    """Standby engines."""
    gpu_memory_service: GpuMemoryService | None = None
    """Shared GPU memory."""
    grove: Grove | None = None
    """Grove settings."""


class ScalingAdapterOptIn(Model):
    """Its presence creates a scaling adapter for the component."""


def _picker_only(data: Any) -> Iterator[Violation]:
    if data.get("eppConfig") is not None and data.get("type") != "epp":
        yield Violation(("eppConfig",), data["eppConfig"], "absent, or type: epp")


def _container_names(component: Any) -> list[str]:
    template = component.get("podTemplate")
    spec = template.get("spec") if isinstance(template, dict) else None
    containers = spec.get("containers") if isinstance(spec, dict) else None
    items = containers if isinstance(containers, list) else []
    return [str(item.get("name")) for item in items if isinstance(item, dict)]


def _sidecar_exists(data: Any) -> Iterator[Violation]:
    sidecar = data.get("frontendSidecar")
    if not isinstance(sidecar, str):
        return
    names = _container_names(data)
    if sidecar not in names:
        among = ": " + ", ".join(names) if names else ", and there is none"
        expected = f"a container of podTemplate.spec.containers{among}"
        yield Violation(("frontendSidecar",), sidecar, expected)


class Component(Model):
    """One part of a graph: a frontend, a set of workers, a picker or a planner."""

    name: Annotated[
        str,
        Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$"),
    ]
    """Name, unique in the graph whatever its case."""
    type: ComponentType | None = None
    """What the component does; decides defaults for ports, probes and commands."""
    replicas: Count | None = None
    """Pods (or engines, if one spans several nodes); the scaling adapter's while there is one."""
    pod_template: PodTemplate | None = None
    """Pod template; its container `main` runs the component."""
    scaling_adapter: ScalingAdapterOptIn | None = None
    """Present (`{}`) if an autoscaler sets the replicas through a scaling adapter."""
    multinode: Multinode | None = None
    """An engine that spans several nodes."""
    shared_memory_size: Quantity | None = None
    """Size of /dev/shm; 8Gi by default, 0 for none."""
    model_ref: ModelRef | None = None
    """Model that the component serves."""
    compilation_cache: CompilationCache | None = None
    """Volume for compiled kernels."""
    frontend_sidecar: str | None = None
    """Container of the pod template that is a frontend beside a worker."""
    epp_config: EppConfig | None = None
    """Configuration of Dynamo's own endpoint picker."""
    global_dynamo_namespace: Bool | None = None
    """Whether the component is shared by all graphs."""
    min_available: Positive | None = None
    """Pods that must run for the component to count as available."""
    runtime_version_override: RuntimeVersion | None = None
    """Version of the runtime where the image's tag does not tell it."""
    provider_override: ProviderOverride | None = None
    """Setting handed to the workload provider."""
    topology_constraint: TopologyPack | None = None
    """Domain that the pods stay within."""
    experimental: ComponentExperimental | None = None
    """Settings whose shape may still change."""

    elsewhere: ClassVar = {
        "componentType": "type",
        "subComponentType": "type: prefill or type: decode",
        "env": "podTemplate.spec.containers[main].env",
        "envs": "podTemplate.spec.containers[main].env",
        "envFromSecret": "podTemplate.spec.containers[main].envFrom",
        "resources": "podTemplate.spec.containers[main].resources",
        "image": "podTemplate.spec.containers[main].image",
        "command": "podTemplate.spec.containers[main].command",
        "args": "podTemplate.spec.containers[main].args",
        "livenessProbe": "podTemplate.spec.containers[main].livenessProbe",
        "readinessProbe": "podTemplate.spec.containers[main].readinessProbe",
        "volumeMounts": "podTemplate.spec.containers[main].volumeMounts",
        "volumes": "podTemplate.spec.volumes",
        "containers": "podTemplate.spec.containers",
        "nodeSelector": "podTemplate.spec.nodeSelector",
        "tolerations": "podTemplate.spec.tolerations",
        "extraPodSpec": "podTemplate.spec (extraPodSpec is v1alpha1's)",
        "extraPodMetadata": "podTemplate.metadata",
        "labels": "podTemplate.metadata.labels",
        "annotations": "podTemplate.metadata.annotations",
        "sharedMemory": "sharedMemorySize",
        "checkpoint": "experimental.checkpoint",
        "failover": "experimental.failover",
        "gpuMemoryService": "experimental.gpuMemoryService",
        "ingress": "an Ingress or HTTPRoute of your own that points at the frontend's Service",
        "autoscaling": "scalingAdapter: {} and an autoscaler that addresses the adapter",
    }
    rules = (
        Rule(
            "eppConfig may only be set when type is epp",
            "!has(self.eppConfig) || (has(self.type) && self.type == 'epp')",
            check=_picker_only,
        ),
        Rule("frontendSidecar must name a container", check=_sidecar_exists),
        *MIN_AVAILABLE_RULES,
    )


class GraphTopology(Model):
    """A domain that the graph's pods stay within."""

    cluster_topology_name: Text
    """Cluster topology that names the domains."""
    pack_domain: TopologyDomain | None = None
    """Domain."""


def _one_picker(components: Any) -> Iterator[Violation]:
    items = components if isinstance(components, list) else []
    pickers = [i for i, c in enumerate(items) if isinstance(c, dict) and c.get("type") == "epp"]
    for index in pickers[1:]:
        yield Violation((index, "type"), "epp", f"one epp, and [{pickers[0]}] is one already")


def _unique_ignoring_case(components: Any) -> Iterator[Violation]:
    seen: dict[str, int] = {}
    for index, item in enumerate(components if isinstance(components, list) else []):
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str):
            continue
        first = seen.setdefault(name.lower(), index)
        if first != index and components[first]["name"] != name:
            expected = f"a name that differs from that of [{first}] in more than case"
            yield Violation((index, "name"), name, expected)


def _restart_order(data: Any) -> Iterator[Violation]:
    restart, components = data.get("restart"), data.get("components")
    strategy = restart.get("strategy") if isinstance(restart, dict) else None
    order = strategy.get("order") if isinstance(strategy, dict) else None
    if not order or not isinstance(order, list) or not isinstance(components, list):
        return
    names = [c.get("name") for c in components if isinstance(c, dict)]
    if sorted(map(str, order)) != sorted(map(str, names)):
        expected = "every component once: " + ", ".join(map(str, names))
        yield Violation(("restart", "strategy", "order"), order, expected)


class GraphSpec(Model):
    """The graph that is wanted."""

    components: Annotated[
        list[Component], Field(max_length=25, json_schema_extra=list_map("name"))
    ] = Field(default_factory=list)
    """The graph's parts."""
    backend_framework: Backend | None = None
    """Engine of the workers."""
    env: list[EnvVar] = Field(default_factory=list)
    """Environment variables of every component; a component's own win."""
    annotations: StringMap = Field(default_factory=dict)
    """Annotations of everything that is rendered."""
    labels: StringMap = Field(default_factory=dict)
    """Labels of everything that is rendered."""
    priority_class_name: str | None = None
    """Priority class of the pods."""
    restart: Restart | None = None
    """Request to restart the pods."""
    topology_constraint: GraphTopology | None = None
    """Domain that the pods stay within."""
    provider_override: ProviderOverride | None = None
    """Setting handed to the workload provider."""
    experimental: GraphExperimental | None = None
    """Settings whose shape may still change."""

    elsewhere: ClassVar = {
        "services": "components, a list with names (services is v1alpha1's)",
        "envs": "env",
        "pvcs": "PersistentVolumeClaims of your own and podTemplate.spec.volumes",
    }
    rules = (
        RESTART_UNSET_ON_CREATE,
        Rule(
            "at most one component may have type epp",
            "self.filter(c, has(c.type) && c.type == 'epp').size() <= 1",
            at="components",
            check=_one_picker,
        ),
        Rule(
            "component names must be unique case-insensitively",
            "self.all(c1, !has(c1.name) || self.filter(c2,"
            " has(c2.name) && c2.name.lowerAscii() == c1.name.lowerAscii()).size() == 1)",
            at="components",
            check=_unique_ignoring_case,
        ),
        Rule("restart.strategy.order must be complete", check=_restart_order),
    )


class RollingUpdateStatus(Model):
    """Progress of a rollout."""

    phase: RolloutPhase | None = None
    """How far it is."""
    start_time: Time | None = None
    """When it began."""
    end_time: Time | None = None
    """When it ended."""
    updated_components: list[str] = Field(default_factory=list)
    """Components that run the latest template."""


class GraphStatus(Model):
    """The graph that is observed."""

    state: GraphState = "initializing"
    """Summary of the conditions."""
    observed_generation: Int64 | None = None
    """Generation that this is about."""
    conditions: Annotated[list[Condition], Field(json_schema_extra=list_map("type"))] = Field(
        default_factory=list
    )
    """The state's aspects."""
    components: dict[str, ReplicaStatus] = Field(default_factory=dict)
    """Replicas by component."""
    checkpoints: dict[str, CheckpointStatus] = Field(default_factory=dict)
    """Checkpoints by component."""
    placement: PlacementStatus | None = None
    """Fit to the topology."""
    restart: RestartStatus | None = None
    """Progress of a restart."""
    rolling_update: RollingUpdateStatus | None = None
    """Progress of a rollout."""


class DynamoGraphDeployment(Resource):
    """An inference graph: frontends, workers and what belongs to them, as one object."""

    api_version: Literal["nvidia.com/v1beta1"] = API_VERSION
    kind: Literal["DynamoGraphDeployment"] = "DynamoGraphDeployment"
    metadata: Metadata
    spec: GraphSpec = Field(default_factory=GraphSpec)
    """The graph that is wanted."""
    status: GraphStatus | None = None
    """The graph that is observed."""


class AdapterTarget(Model):
    """The component that an adapter scales."""

    name: Text
    """Name of the DynamoGraphDeployment."""
    component_name: Text
    """Name of the component in it."""


class AdapterSpec(Model):
    """The number of replicas that is wanted."""

    dgd_ref: AdapterTarget
    """The component to scale."""
    replicas: Count
    """Wanted replicas; autoscalers write this through the scale subresource."""


class AdapterStatus(Model):
    """The number of replicas that is observed."""

    replicas: Count
    """Observed replicas."""
    selector: str | None = None
    """Label selector of the component's pods, for autoscalers."""
    last_scale_time: Time | None = None
    """When the adapter's number last changed."""
    observed_generation: Int64 | None = None
    """Generation of the adapter that this is about."""


class DynamoGraphDeploymentScalingAdapter(Resource):
    """Scale subresource for one component of a graph, for HPA, KEDA and planners."""

    api_version: Literal["nvidia.com/v1beta1"] = API_VERSION
    kind: Literal["DynamoGraphDeploymentScalingAdapter"] = "DynamoGraphDeploymentScalingAdapter"
    metadata: Metadata
    spec: AdapterSpec
    """The number of replicas that is wanted."""
    status: AdapterStatus | None = None
    """The number of replicas that is observed."""


KINDS: dict[str, type[DynamoGraphDeployment | DynamoGraphDeploymentScalingAdapter]] = {
    "DynamoGraphDeployment": DynamoGraphDeployment,
    "DynamoGraphDeploymentScalingAdapter": DynamoGraphDeploymentScalingAdapter,
}

__all__ = [
    "API_VERSION",
    "COMPONENT_TYPES",
    "GROUP",
    "KINDS",
    "VERSION",
    "Component",
    "ComponentType",
    "DynamoGraphDeployment",
    "DynamoGraphDeploymentScalingAdapter",
    "GraphSpec",
    "GraphStatus",
]
