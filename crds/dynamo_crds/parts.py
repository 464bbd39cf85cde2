"""Objects that both versions of a graph share, and the metadata that every object has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from dynamo_crds.schema import (
    DNS_NAME_PATTERN,
    LIST_SET,
    Bool,
    Count,
    DnsLabel,
    Int64,
    Model,
    Number,
    Opaque,
    OpenModel,
    Positive,
    Quantity,
    Rule,
    StringMap,
    Text,
    Time,
    TopologyDomain,
    Violation,
    list_map,
)

Backend = Literal["sglang", "vllm", "trtllm"]


def _named(data: Any) -> Iterator[Violation]:
    if not data.get("name") and not data.get("generateName"):
        yield Violation(("name",), data.get("name"), "the object's name, for example my-graph")


class Metadata(Model):
    """Kubernetes' object metadata."""

    name: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=253,
                pattern=DNS_NAME_PATTERN,
            ),
        ]
        | None
    ) = None
    generate_name: str | None = None
    namespace: str | None = None
    labels: StringMap = Field(default_factory=dict)
    annotations: StringMap = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)
    owner_references: list[Opaque] = Field(default_factory=list)
    uid: str | None = None
    resource_version: str | None = None
    generation: Int64 | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: Int64 | None = None
    self_link: str | None = None
    managed_fields: list[Opaque] = Field(default_factory=list)

    rules = (Rule("metadata.name is required", check=_named),)


class ConfigMapKey(Model):
    """One key of a ConfigMap."""

    key: str
    """Key in the ConfigMap's data."""
    name: str = ""
    """Name of the ConfigMap, in the graph's namespace."""
    optional: Bool | None = None
    """Whether the ConfigMap or its key may be missing."""


class SecretKey(Model):
    """One key of a Secret."""

    key: str
    """Key in the Secret's data."""
    name: str = ""
    """Name of the Secret, in the graph's namespace."""
    optional: Bool | None = None
    """Whether the Secret or its key may be missing."""


class FieldPath(Model):
    """A field of the pod."""

    field_path: str
    """Path of the field, for example `status.podIP`."""
    api_version: str | None = None
    """Version of the schema that the path is written for."""


class ResourceField(Model):
    """A resource request or limit of a container."""

    resource: str
    """Resource, for example `limits.cpu`."""
    container_name: str | None = None
    """Container whose resource is meant."""
    divisor: Quantity | None = None
    """Unit of the exposed value."""


class FileKey(Model):
    """One variable of a file in a volume."""

    key: str
    """Variable's name in the file."""
    path: str
    """Path of the file within the volume."""
    volume_name: str
    """Volume that holds the file."""
    optional: Bool = False
    """Whether the file or the variable may be missing."""


class EnvVarSource(Model):
    """Where an environment variable's value comes from."""

    config_map_key_ref: ConfigMapKey | None = None
    """A key of a ConfigMap."""
    field_ref: FieldPath | None = None
    """A field of the pod."""
    file_key_ref: FileKey | None = None
    """A variable of a file."""
    resource_field_ref: ResourceField | None = None
    """A resource of a container."""
    secret_key_ref: SecretKey | None = None
    """A key of a Secret."""


def _one_source(data: Any) -> Iterator[Violation]:
    if data.get("value") and data.get("valueFrom") is not None:
        yield Violation(("valueFrom",), data["valueFrom"], "either value or valueFrom")


class EnvVar(Model):
    """An environment variable, as in a Kubernetes container."""

    name: Text
    """Name of the variable."""
    value: str | None = None
    """Value; `$(OTHER)` is expanded by Kubernetes."""
    value_from: EnvVarSource | None = None
    """Source of the value; excludes `value`."""

    rules = (Rule("value and valueFrom exclude each other", check=_one_source),)


class ProviderOverride(Model):
    """A setting handed through to a workload provider, such as Grove."""

    api_version: Text
    """Version of the provider's object."""
    target: str | None = None
    """Which of the provider's objects is meant."""
    value: Opaque
    """What to set there."""


def _one_topology_source(data: Any) -> Iterator[Violation]:
    label, cluster = data.get("labelKey"), data.get("clusterTopologyName")
    if (label is None) == (cluster is None):
        value = None if label is None else {"labelKey": label, "clusterTopologyName": cluster}
        yield Violation((), value, "exactly one of labelKey and clusterTopologyName")


def _weight_needed(data: Any) -> Iterator[Violation]:
    if data.get("enforcement") == "preferred" and data.get("preferredWeight") is None:
        yield Violation(("preferredWeight",), None, "a number from 0 to 1")


def _weight_allowed(data: Any) -> Iterator[Violation]:
    weight = data.get("preferredWeight")
    if weight is not None and data.get("enforcement", "required") != "preferred":
        yield Violation(("preferredWeight",), weight, "absent, or enforcement: preferred")


def _label_prefix(value: Any) -> Iterator[Violation]:
    if isinstance(value, str) and "/" in value and len(value.split("/")[0]) > 253:
        yield Violation((), value, "a prefix of at most 253 characters before the slash")


class KvTransferPolicy(Model):
    """Which decode workers may take over a prefill worker's blocks, by topology."""

    cluster_topology_name: Text | None = None
    """Cluster topology that names the domains; excludes `labelKey`."""
    domain: TopologyDomain
    """Domain within which blocks move."""
    enforcement: Literal["required", "preferred"] = "required"
    """Whether the domain filters candidates or only weighs in."""
    label_key: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=317,
                pattern=(
                    r"^(([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*/)?"
                    r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)$"
                ),
            ),
        ]
        | None
    ) = None
    """Node label whose value is the domain; excludes `clusterTopologyName`."""
    preferred_weight: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Weight of the domain in the choice, only with `enforcement: preferred`."""

    rules = (
        Rule(
            "exactly one of labelKey or clusterTopologyName is required",
            "has(self.labelKey) != has(self.clusterTopologyName)",
            check=_one_topology_source,
        ),
        Rule(
            "preferredWeight is required when enforcement is preferred",
            "!has(self.enforcement) || self.enforcement != 'preferred'"
            " || has(self.preferredWeight)",
            check=_weight_needed,
        ),
        Rule(
            "preferredWeight may only be set when enforcement is preferred",
            "!has(self.preferredWeight)"
            " || (has(self.enforcement) && self.enforcement == 'preferred')",
            check=_weight_allowed,
        ),
        Rule(
            "labelKey prefix must be 253 characters or less",
            "!self.contains('/') || self.split('/')[0].size() <= 253",
            at="labelKey",
            check=_label_prefix,
        ),
    )


class GraphExperimental(Model):
    """Graph-wide settings whose shape may still change."""

    kv_transfer_policy: KvTransferPolicy | None = None
    """Topology-aware choice of decode workers."""


def _no_order_in_parallel(data: Any) -> Iterator[Violation]:
    if data.get("type") == "Parallel" and data.get("order"):
        yield Violation(("order",), data["order"], "absent, because a parallel restart has none")


class RestartStrategy(Model):
    """Order of a restart."""

    type: Literal["Sequential", "Parallel"] = "Sequential"
    """One component after the other, or all at once."""
    order: list[str] = Field(default_factory=list)
    """All components in the order of a sequential restart."""

    rules = (Rule("order is only for type Sequential", check=_no_order_in_parallel),)


class Restart(Model):
    """A request to restart the graph's pods."""

    id: Text
    """A changed id asks for one restart."""
    strategy: RestartStrategy | None = None
    """How the components follow each other."""


RESTART_UNSET_ON_CREATE = Rule(
    "spec.restart must be unset on create; set spec.restart.id after creation to request a restart",
    "oldSelf.hasValue() || !has(self.restart)",
    optional_old_self=True,
)


class PickerPlugin(OpenModel):
    """A plugin of a foreign endpoint picker."""

    type: str
    """Plugin's type."""
    name: str | None = None
    """Plugin's name within the configuration."""


class PickerPluginRef(OpenModel):
    """Use of a plugin in a profile."""

    plugin_ref: str
    """Name of the plugin."""
    weight: Number | None = None
    """Weight of its score."""


class PickerProfile(OpenModel):
    """A scheduling profile of a foreign endpoint picker."""

    name: str
    """Profile's name."""
    plugins: list[PickerPluginRef]
    """Its plugins."""


class PickerConfig(OpenModel):
    """Configuration of a foreign endpoint picker, kept as written."""

    plugins: list[PickerPlugin]
    """Plugins by name."""
    scheduling_profiles: list[PickerProfile]
    """Profiles that use them."""


class ModelRef(Model):
    """The model that a component serves, for endpoint discovery."""

    name: Text
    """Model's name."""
    revision: str | None = None
    """Model's revision."""


class TopologyPack(Model):
    """A domain that a component's pods stay within."""

    pack_domain: TopologyDomain
    """Topology domain, for example `rack`."""


class MultinodeRole(Model):
    """Provider settings for one role of a multinode component."""

    provider_override: ProviderOverride | None = None
    """Setting for this role's pods."""


class Multinode(Model):
    """An engine that spans several nodes."""

    node_count: Annotated[Positive, Field(ge=2)] = 2
    """Nodes of one engine."""
    leader: MultinodeRole | None = None
    """Settings of the first node's pod."""
    worker: MultinodeRole | None = None
    """Settings of the other nodes' pods."""


class CheckpointIdentity(Model):
    """What a checkpoint was taken of (superseded by references to checkpoints)."""

    model: Text
    """Model's name."""
    backend_framework: Backend
    """Engine."""
    dtype: str | None = None
    """Data type of the weights."""
    dynamo_version: str | None = None
    """Version of the runtime."""
    extra_parameters: StringMap = Field(default_factory=dict)
    """Other parameters that tell checkpoints apart."""
    max_model_len: Positive | None = None
    """Context length."""
    pipeline_parallel_size: Positive = 1
    """Pipeline parallelism."""
    tensor_parallel_size: Positive = 1
    """Tensor parallelism."""


class CheckpointJob(Model):
    """The job that takes a checkpoint."""

    gms_client_containers: Annotated[list[DnsLabel], Field(json_schema_extra=LIST_SET)] = Field(
        default_factory=list
    )
    """Containers that use the GPU memory service."""
    pod_template: Opaque | None = None
    """Changes to the job's pod."""


def _job_or_reference(data: Any) -> Iterator[Violation]:
    if data.get("job") is not None and data.get("checkpointRef"):
        yield Violation(("job",), data["job"], "absent, because checkpointRef is set")


class Checkpoint(Model):
    """Start of a worker from a snapshot of a warm one."""

    checkpoint_ref: str | None = None
    """Name of an existing checkpoint; excludes `job`."""
    deletion_policy: Literal["Delete", "Retain"] = "Delete"
    """What becomes of the checkpoint with the graph."""
    identity: CheckpointIdentity | None = None
    """What the checkpoint is of."""
    job: CheckpointJob | None = None
    """Job that takes the checkpoint; excludes `checkpointRef`."""
    mode: Literal["Auto", "Manual"] | None = None
    """Whether the checkpoint is taken by the operator."""
    startup_policy: Literal["Immediate", "WaitForCheckpoint"] = "Immediate"
    """Whether pods wait for the checkpoint."""
    target_container_name: DnsLabel = "main"
    """Container that is restored."""

    rules = (
        Rule(
            "checkpoint.job cannot be set when checkpointRef is specified",
            "!has(self.job) || !has(self.checkpointRef) || size(self.checkpointRef) == 0",
            check=_job_or_reference,
        ),
    )


class MemoryServiceClientPod(Model):
    """A pod beside the engine that uses its GPU memory."""

    name: DnsLabel
    """Pod's name."""
    pod_template: Opaque
    """Pod's template."""


def _min_available(data: Any) -> Iterator[Violation]:
    least, replicas = data.get("minAvailable"), data.get("replicas", 1)
    if isinstance(least, int) and isinstance(replicas, int) and 0 < replicas < least:
        yield Violation(("minAvailable",), least, f"at most replicas ({replicas})")


MIN_AVAILABLE_RULES = (
    Rule(
        "minAvailable must be less than or equal to replicas unless replicas is 0",
        "!has(self.minAvailable) || (has(self.replicas) && self.replicas == 0)"
        " || self.minAvailable <= (has(self.replicas) ? self.replicas : 1)",
        check=_min_available,
    ),
    Rule(
        "minAvailable is immutable after creation",
        "!has(oldSelf.minAvailable)"
        " || (has(self.minAvailable) && self.minAvailable == oldSelf.minAvailable)",
    ),
)

RuntimeVersion = Annotated[
    str,
    Field(pattern=r"^(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})$"),
]


class Condition(Model):
    """One aspect of an object's state, as Kubernetes' conventions have it."""

    type: Annotated[
        str,
        Field(
            max_length=316,
            pattern=(
                r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
                r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$"
            ),
        ),
    ]
    """Aspect, in CamelCase."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[
        str,
        Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"),
    ]
    """Why, as one word for programs."""
    message: Annotated[str, Field(max_length=32768)]
    """Why, for people."""
    last_transition_time: Time
    """When `status` last changed."""
    observed_generation: Annotated[Int64, Field(ge=0)] | None = None
    """Generation of the object that this is about."""


class CheckpointStatus(Model):
    """A component's checkpoint."""

    checkpoint_id: str | None = Field(default=None, alias="checkpointID")
    """Identity of the snapshot."""
    checkpoint_name: str | None = None
    """Name of the checkpoint object."""
    identity_hash: str | None = None
    """Hash of what the checkpoint is of."""
    ready: Bool | None = None
    """Whether pods can start from it."""


class ReplicaStatus(Model):
    """Observed replicas of one component."""

    component_kind: Literal["PodClique", "PodCliqueScalingGroup", "Deployment", "LeaderWorkerSet"]
    """Kind of the workload objects."""
    component_names: list[str] = Field(default_factory=list)
    """Names of the workload objects."""
    runtime_namespace: str | None = None
    """Namespace in which the workers find each other."""
    replicas: Count
    """Pods that exist."""
    updated_replicas: Count
    """Pods of the latest template."""
    ready_replicas: Count | None = None
    """Pods that are ready."""
    available_replicas: Count | None = None
    """Pods that are ready for long enough."""
    scheduled_replicas: Count | None = None
    """Pods that have a node."""
    conditions: Annotated[list[Condition], Field(json_schema_extra=list_map("type"))] = Field(
        default_factory=list
    )
    """The component's own conditions: Available, Routable, ScalingActive."""


class PlacementStatus(Model):
    """How well the pods fit the topology."""

    score: Annotated[Number, Field(ge=0, le=1)] | None = None
    """1 is best."""
    state: Literal["Reported", "Partial", "Unsupported", "Unknown"] | None = None
    """Whether the score is known."""


class RestartStatus(Model):
    """Progress of a restart."""

    observed_id: str | None = Field(default=None, alias="observedID")
    """The restart that this is about."""
    phase: str | None = None
    """Pending, Restarting, Completed, Failed or Superseded."""
    in_progress: list[str] = Field(default_factory=list)
    """Components that restart at this moment."""


RolloutPhase = Literal["Pending", "InProgress", "Completed", "Failed", ""]
GraphState = Literal["initializing", "pending", "successful", "failed"]
