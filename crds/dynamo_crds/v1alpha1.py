"""Version v1alpha1, served for manifests written before v1beta1: graphs as a map of services.

A service describes its container by many fields of its own (`resources`, `envs`, probes, mounts)
beside a pod specification; `dynamo_crds.conversion` turns that into a pod template.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

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
from dynamo_crds.pod import EXECUTOR_RULE, ExtraPodSpec, Probe
from dynamo_crds.schema import (
    DNS_NAME_PATTERN,
    LIST_SET,
    Bool,
    Count,
    DnsLabel,
    Int32,
    Int64,
    Model,
    Opaque,
    Positive,
    Quantity,
    QuantityText,
    RawObject,
    Resource,
    Rule,
    StringMap,
    Text,
    Time,
    TopologyDomain,
    Violation,
    drop_null_entries,
    is_quantity,
    list_map,
    quantity_number,
)

VERSION = "v1alpha1"
API_VERSION: Literal["nvidia.com/v1alpha1"] = "nvidia.com/v1alpha1"

SERVICE_TYPES = ("frontend", "worker", "prefill", "decode", "planner", "epp", "main", "default", "")
SUB_TYPES = ("prefill", "decode", "")


class ResourceAmounts(Model):
    """Amounts of resources, as texts."""

    cpu: QuantityText | None = None
    """CPU cores."""
    memory: QuantityText | None = None
    """Memory."""
    gpu: QuantityText | None = None
    """GPUs."""
    gpu_type: str | None = None
    """Resource name of the GPUs; `nvidia.com/gpu` by default."""
    custom: Annotated[dict[str, QuantityText], BeforeValidator(drop_null_entries)] = Field(
        default_factory=dict
    )
    """Other resources by name."""


class ResourceClaimRef(Model):
    """Use of one of the pod's resource claims."""

    name: str
    """Name of the claim in the pod."""
    request: str | None = None
    """One request of the claim."""


class ServiceResources(Model):
    """Resources of a service's main container."""

    requests: ResourceAmounts | None = None
    """What the scheduler reserves."""
    limits: ResourceAmounts | None = None
    """Most that the container may use."""
    claims: list[ResourceClaimRef] = Field(default_factory=list)
    """Claims of devices."""


class Autoscaling(Model):
    """Deprecated and ignored: autoscalers address the scaling adapter."""

    enabled: Bool | None = None
    """Ignored."""
    min_replicas: Int32 | None = None
    """Ignored."""
    max_replicas: Int32 | None = None
    """Ignored."""
    behavior: Opaque | None = None
    """Ignored."""
    metrics: list[Opaque] = Field(default_factory=list)
    """Ignored."""


class ServiceCheckpoint(Checkpoint):
    """Start of a worker from a snapshot of a warm one."""

    enabled: Bool = False
    """Whether checkpoints are used."""


class EppConfig(Model):
    """Configuration of Dynamo's own endpoint picker; ours takes none of it."""

    config_map_ref: ConfigMapKey | None = None
    """ConfigMap that holds the configuration."""
    config: Annotated[dict[str, Any], RawObject(PickerConfig)] | None = None
    """The configuration itself, kept as written."""


class PodMetadataExtra(Model):
    """Labels and annotations of the service's pods."""

    annotations: StringMap = Field(default_factory=dict)
    """Annotations."""
    labels: StringMap = Field(default_factory=dict)
    """Labels."""

    rules = (EXECUTOR_RULE,)


class Failover(Model):
    """Standby engines."""

    enabled: Bool
    """Whether there are standbys."""
    mode: Literal["intraPod", "interPod"] = "intraPod"
    """Where the standby runs."""
    num_shadows: Positive = 1
    """Number of standbys."""


class FrontendSidecar(Model):
    """A frontend container beside the service's main container."""

    image: str
    """Image."""
    args: list[str] = Field(default_factory=list)
    """Arguments."""
    envs: list[EnvVar] = Field(default_factory=list)
    """Environment variables."""
    env_from_secret: str | None = None
    """Secret whose keys become environment variables."""


def _intra_pod_clients(data: Any) -> Iterator[Violation]:
    if data.get("extraClientContainers") and data.get("mode", "intraPod") != "intraPod":
        yield Violation(
            ("extraClientContainers",), data["extraClientContainers"], "absent, or mode: intraPod"
        )


def _no_client_pods(data: Any) -> Iterator[Violation]:
    if data.get("extraClientPods"):
        yield Violation(("extraClientPods",), data["extraClientPods"], "absent")


class GpuMemoryService(Model):
    """GPU memory shared between an engine and its neighbours."""

    enabled: Bool
    """Whether memory is shared."""
    mode: Literal["intraPod", "interPod"] = "intraPod"
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
            "extraClientContainers is only supported with mode=intraPod",
            "!has(self.extraClientContainers) || size(self.extraClientContainers) == 0"
            " || self.mode == 'intraPod'",
            check=_intra_pod_clients,
        ),
        Rule(
            "extraClientPods is reserved and not implemented",
            "!has(self.extraClientPods) || size(self.extraClientPods) == 0",
            check=_no_client_pods,
        ),
    )


class IngressTls(Model):
    """TLS of an ingress."""

    secret_name: str | None = None
    """Secret with the certificate."""


class Ingress(Model):
    """Exposure of a frontend outside the cluster; v1beta1 leaves that to the user's own objects."""

    enabled: Bool | None = None
    """Whether there is one."""
    host: str | None = None
    """Host name."""
    host_prefix: str | None = None
    """Text before the host name."""
    host_suffix: str | None = None
    """Text after the host name."""
    ingress_controller_class_name: str | None = None
    """Ingress class."""
    annotations: StringMap = Field(default_factory=dict)
    """Annotations of the Ingress."""
    labels: StringMap = Field(default_factory=dict)
    """Labels of the Ingress."""
    tls: IngressTls | None = None
    """TLS."""
    use_virtual_service: Bool | None = None
    """Whether Istio's VirtualService is used."""
    virtual_service_gateway: str | None = None
    """Istio gateway."""


class ScalingAdapterSwitch(Model):
    """Whether an autoscaler sets the replicas through a scaling adapter."""

    enabled: Bool = False
    """Whether there is an adapter."""


def _shared_memory_size(data: Any) -> Iterator[Violation]:
    size = data.get("size")
    if data.get("disabled") is True:
        return
    if size is None or (is_quantity(size) and quantity_number(size) <= 0):
        yield Violation(("size",), size, "a size above 0, or disabled: true")


class SharedMemory(Model):
    """Size of /dev/shm."""

    disabled: Bool | None = None
    """Whether the pod has none of its own."""
    size: Quantity | None = None
    """Size, for example 8Gi."""

    rules = (
        Rule(
            "size is required when disabled is false",
            "(has(self.disabled) && self.disabled)"
            " || (has(self.size) && quantity(self.size).isGreaterThan(quantity('0')))",
            check=_shared_memory_size,
        ),
    )


class ServiceVolumeMount(Model):
    """One of the graph's PersistentVolumeClaims in a service's main container."""

    name: Text
    """Name of the claim."""
    mount_point: str | None = None
    """Where it appears."""
    use_as_compilation_cache: Bool = False
    """Whether the engine keeps its compiled kernels there."""


def _known_type(value: Any) -> Iterator[Violation]:
    if isinstance(value, str) and value not in SERVICE_TYPES:
        yield Violation((), value, "one of " + ", ".join(t for t in SERVICE_TYPES if t))


def _known_sub_type(value: Any) -> Iterator[Violation]:
    if isinstance(value, str) and value not in SUB_TYPES:
        yield Violation((), value, "one of " + ", ".join(t for t in SUB_TYPES if t))


class Service(Model):
    """One part of a graph."""

    component_type: str | None = None
    """frontend, worker, planner, epp; `main` and `default` mean a component without defaults."""
    sub_component_type: str | None = None
    """prefill or decode, for workers."""
    service_name: str | None = None
    """Name; the key of the service is what counts."""
    dynamo_namespace: str | None = None
    """Deprecated: the graph decides it."""
    global_dynamo_namespace: Bool | None = None
    """Whether the service is shared by all graphs."""
    replicas: Count | None = None
    """Pods (or engines, if one spans several nodes)."""
    resources: ServiceResources | None = None
    """Resources of the main container."""
    envs: list[EnvVar] = Field(default_factory=list)
    """Environment variables of the main container."""
    env_from_secret: str | None = None
    """Secret whose keys become environment variables of the main container."""
    volume_mounts: list[ServiceVolumeMount] = Field(default_factory=list)
    """Claims mounted into the main container."""
    liveness_probe: Probe | None = None
    """Liveness probe of the main container."""
    readiness_probe: Probe | None = None
    """Readiness probe of the main container."""
    shared_memory: SharedMemory | None = None
    """Size of /dev/shm."""
    annotations: StringMap = Field(default_factory=dict)
    """Annotations of what is rendered."""
    labels: StringMap = Field(default_factory=dict)
    """Labels of what is rendered."""
    extra_pod_metadata: PodMetadataExtra | None = None
    """Labels and annotations of the pods."""
    extra_pod_spec: ExtraPodSpec | None = None
    """Pod specification, with the main container as `mainContainer`."""
    multinode: Multinode | None = None
    """An engine that spans several nodes."""
    scaling_adapter: ScalingAdapterSwitch | None = None
    """Whether autoscalers set the replicas."""
    autoscaling: Autoscaling | None = None
    """Deprecated and ignored."""
    ingress: Ingress | None = None
    """Exposure outside the cluster."""
    model_ref: ModelRef | None = None
    """Model that the service serves."""
    epp_config: EppConfig | None = None
    """Configuration of Dynamo's own endpoint picker."""
    frontend_sidecar: FrontendSidecar | None = None
    """A frontend beside the main container."""
    checkpoint: ServiceCheckpoint | None = None
    """Start from a snapshot."""
    failover: Failover | None = None
    """Standby engines."""
    gpu_memory_service: GpuMemoryService | None = None
    """Shared GPU memory."""
    min_available: Positive | None = None
    """Pods that must run for the service to count as available."""
    runtime_version_override: RuntimeVersion | None = None
    """Version of the runtime where the image's tag does not tell it."""
    provider_override: ProviderOverride | None = None
    """Setting handed to the workload provider."""
    topology_constraint: TopologyPack | None = None
    """Domain that the pods stay within."""

    elsewhere: ClassVar = {
        "type": "componentType, and subComponentType for prefill and decode",
        "env": "envs",
        "podTemplate": "extraPodSpec and extraPodMetadata (podTemplate is v1beta1's)",
        "sharedMemorySize": "sharedMemory.size",
        "image": "extraPodSpec.mainContainer.image",
        "command": "extraPodSpec.mainContainer.command",
        "args": "extraPodSpec.mainContainer.args",
        "containers": "extraPodSpec.containers",
        "nodeSelector": "extraPodSpec.nodeSelector",
        "tolerations": "extraPodSpec.tolerations",
        "volumes": "extraPodSpec.volumes",
    }
    rules = (
        Rule(
            "unknown componentType",
            f"self in {[*SERVICE_TYPES]}",
            at="componentType",
            check=_known_type,
        ),
        Rule(
            "unknown subComponentType",
            f"self in {[*SUB_TYPES]}",
            at="subComponentType",
            check=_known_sub_type,
        ),
        EXECUTOR_RULE,
        *MIN_AVAILABLE_RULES,
    )


def _volume_is_complete(data: Any) -> Iterator[Violation]:
    if data.get("create") is True:
        for name in ("size", "storageClass", "volumeAccessMode"):
            if data.get(name) is None:
                yield Violation((name,), None, "a value, because create is true")


class PersistentVolume(Model):
    """A PersistentVolumeClaim that services mount by name."""

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_NAME_PATTERN)]
    """Name of the claim."""
    create: Bool | None = None
    """Whether the claim is created with the graph."""
    storage_class: str | None = None
    """Storage class of a created claim."""
    size: Quantity | None = None
    """Size of a created claim."""
    volume_access_mode: str | None = None
    """Access mode of a created claim."""

    rules = (
        Rule(
            "When create is true, size, storageClass, and volumeAccessMode are required",
            "!has(self.create) || self.create == false"
            " || (has(self.size) && has(self.storageClass) && has(self.volumeAccessMode))",
            check=_volume_is_complete,
        ),
    )


class GraphTopology(Model):
    """A domain that the graph's pods stay within."""

    topology_profile: Text
    """Cluster topology that names the domains."""
    pack_domain: TopologyDomain | None = None
    """Domain."""


def _service_names(services: Any) -> Iterator[Violation]:
    seen: dict[str, str] = {}
    for name in services if isinstance(services, dict) else {}:
        plain = name.replace("-", "")
        if not (name[:1].isalnum() and name[-1:].isalnum() and plain.isalnum() and name.isascii()):
            expected = "a name of letters, digits and dashes that begins and ends with none"
            yield Violation((name,), name, expected, "not a component name")
        elif len(name) > 63:
            yield Violation((name,), name, "at most 63 characters", "name too long")
        first = seen.setdefault(name.lower(), name)
        if first != name:
            expected = f"a name that differs from {first} in more than case"
            yield Violation((name,), name, expected, "service names must be unique")


def _one_picker(services: Any) -> Iterator[Violation]:
    if not isinstance(services, dict):
        return
    pickers = [
        name
        for name, service in services.items()
        if isinstance(service, dict) and service.get("componentType") == "epp"
    ]
    for name in pickers[1:]:
        yield Violation((name, "componentType"), "epp", f"one epp, and {pickers[0]} is one already")


class GraphSpec(Model):
    """The graph that is wanted."""

    services: Annotated[
        dict[str, Service], Field(max_length=25), BeforeValidator(drop_null_entries)
    ] = Field(default_factory=dict)
    """The graph's parts by name."""
    backend_framework: Backend | None = None
    """Engine of the workers."""
    envs: list[EnvVar] = Field(default_factory=list)
    """Environment variables of every service; a service's own win."""
    pvcs: Annotated[list[PersistentVolume], Field(max_length=100)] = Field(default_factory=list)
    """PersistentVolumeClaims that services mount."""
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
        "components": "services, a map by name (components is v1beta1's)",
        "env": "envs",
    }
    rules = (
        RESTART_UNSET_ON_CREATE,
        Rule(
            "service names are letters, digits and dashes, at most 63, unique but for case",
            "self.all(a, size(a) <= 63 && a.matches('^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$')"
            " && self.filter(b, b.lowerAscii() == a.lowerAscii()).size() == 1)",
            at="services",
            check=_service_names,
        ),
        Rule(
            "at most one service may be an epp",
            "self.filter(s, has(self[s].componentType) && self[s].componentType == 'epp')"
            ".size() <= 1",
            at="services",
            check=_one_picker,
        ),
    )


class ServiceReplicaStatus(ReplicaStatus):
    """Observed replicas of one service."""

    component_name: str
    """Name of the first workload object."""


class RollingUpdateStatus(Model):
    """Progress of a rollout."""

    phase: RolloutPhase | None = None
    """How far it is."""
    start_time: Time | None = None
    """When it began."""
    end_time: Time | None = None
    """When it ended."""
    updated_services: list[str] = Field(default_factory=list)
    """Services that run the latest template."""


class GraphStatus(Model):
    """The graph that is observed."""

    state: GraphState = "initializing"
    """Summary of the conditions."""
    observed_generation: Int64 | None = None
    """Generation that this is about."""
    conditions: list[Condition] = Field(default_factory=list)
    """The state's aspects."""
    services: dict[str, ServiceReplicaStatus] = Field(default_factory=dict)
    """Replicas by service."""
    checkpoints: dict[str, CheckpointStatus] = Field(default_factory=dict)
    """Checkpoints by service."""
    placement: PlacementStatus | None = None
    """Fit to the topology."""
    restart: RestartStatus | None = None
    """Progress of a restart."""
    rolling_update: RollingUpdateStatus | None = None
    """Progress of a rollout."""


class DynamoGraphDeployment(Resource):
    """An inference graph in the older form: a map of services."""

    api_version: Literal["nvidia.com/v1alpha1"] = API_VERSION
    kind: Literal["DynamoGraphDeployment"] = "DynamoGraphDeployment"
    metadata: Metadata
    spec: GraphSpec = Field(default_factory=GraphSpec)
    """The graph that is wanted."""
    status: GraphStatus | None = None
    """The graph that is observed."""


class AdapterTarget(Model):
    """The service that an adapter scales."""

    name: Text
    """Name of the DynamoGraphDeployment."""
    service_name: Text
    """Name of the service in it."""


class AdapterSpec(Model):
    """The number of replicas that is wanted."""

    dgd_ref: AdapterTarget
    """The service to scale."""
    replicas: Count
    """Wanted replicas; autoscalers write this through the scale subresource."""


class AdapterStatus(Model):
    """The number of replicas that is observed."""

    replicas: Count | None = None
    """Observed replicas."""
    selector: str | None = None
    """Label selector of the service's pods, for autoscalers."""
    last_scale_time: Time | None = None
    """When the adapter's number last changed."""
    observed_generation: Int64 | None = None
    """Generation of the adapter that this is about."""


class DynamoGraphDeploymentScalingAdapter(Resource):
    """Scale subresource for one service of a graph, for HPA, KEDA and planners."""

    api_version: Literal["nvidia.com/v1alpha1"] = API_VERSION
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
