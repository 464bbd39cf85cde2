"""The declared core of a pod template: the part the platform itself relies on.

A full pod schema would make the CRDs 1.6 MB; Kubernetes checks the rest when the rendered
Deployment is applied. Fields that are not declared here are kept as they are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from dynamo_crds.parts import EnvVarSource
from dynamo_crds.schema import (
    Bool,
    Count,
    DnsLabel,
    Int64,
    OpenModel,
    QuantityMap,
    RawObject,
    Rule,
    StringMap,
    Text,
    Violation,
    list_map,
)

MAIN = "main"
"""The container that runs the component; all others are sidecars."""


class Resources(OpenModel):
    """Resource requests and limits of a container."""

    limits: QuantityMap = Field(default_factory=dict)
    """Most that the container may use."""
    requests: QuantityMap = Field(default_factory=dict)
    """What the scheduler reserves for it."""


class ContainerEnvVar(OpenModel):
    """An environment variable of a container."""

    name: Text
    """Name of the variable."""
    value: str | None = None
    """Value."""
    value_from: EnvVarSource | None = None
    """Source of the value."""


class ContainerPort(OpenModel):
    """A port of a container."""

    container_port: Annotated[Count, Field(ge=1, le=65535)]
    """Port number."""
    name: str | None = None
    """Name by which probes and Services refer to it."""


class VolumeMount(OpenModel):
    """A volume in a container."""

    name: Text
    """Volume's name."""
    mount_path: Text
    """Where it appears."""


class ContainerCore(OpenModel):
    """What the platform reads of a container."""

    image: str | None = None
    """Image."""
    command: list[str] = Field(default_factory=list)
    """Replaces the image's entry point."""
    args: list[str] = Field(default_factory=list)
    """Arguments."""
    env: list[ContainerEnvVar] = Field(default_factory=list)
    """Environment variables."""
    ports: list[ContainerPort] = Field(default_factory=list)
    """Ports."""
    resources: Resources | None = None
    """Requests and limits."""
    volume_mounts: list[VolumeMount] = Field(default_factory=list)
    """Volumes."""
    working_dir: str | None = None
    """Working directory."""


def _sidecar_image(container: Any) -> Iterator[Violation]:
    if container.get("name") != MAIN and not container.get("image"):
        yield Violation(("image",), container.get("image"), "an image")


def _init_image(container: Any) -> Iterator[Violation]:
    if not container.get("image"):
        yield Violation(("image",), container.get("image"), "an image")


class Container(ContainerCore):
    """A container of a pod."""

    name: DnsLabel
    """Name, unique in the pod; the component runs in `main`."""

    rules = (
        Rule(
            "sidecar containers must specify a non-empty image",
            "self.name == 'main' || (has(self.image) && self.image != '')",
            check=_sidecar_image,
        ),
    )


class InitContainer(ContainerCore):
    """A container that runs before the others."""

    name: DnsLabel
    """Name, unique in the pod."""

    rules = (
        Rule(
            "init containers must specify a non-empty image",
            "has(self.image) && self.image != ''",
            check=_init_image,
        ),
    )


class MainContainer(ContainerCore):
    """The container of a v1alpha1 service; its name is always `main`."""

    name: str | None = None
    """Ignored: the container is called `main`."""


class PodSpecCore(OpenModel):
    """What the platform reads of a pod's specification."""

    containers: Annotated[list[Container], Field(json_schema_extra=list_map("name"))] = Field(
        default_factory=list
    )
    """Containers; `main` runs the component, the others are sidecars."""
    init_containers: Annotated[list[InitContainer], Field(json_schema_extra=list_map("name"))] = (
        Field(default_factory=list)
    )
    """Containers that run before."""
    node_selector: StringMap = Field(default_factory=dict)
    """Labels that a node must have."""
    service_account_name: str | None = None
    """Service account of the pod."""
    host_network: Bool | None = None
    """Whether the pod uses its node's network."""
    termination_grace_period_seconds: Annotated[Int64, Field(ge=0)] | None = None
    """Seconds from SIGTERM to SIGKILL."""


EXECUTOR_ANNOTATION = "nvidia.com/vllm-distributed-executor-backend"


def _executor(annotations: Any) -> Iterator[Violation]:
    value = annotations.get(EXECUTOR_ANNOTATION) if isinstance(annotations, dict) else None
    if value is not None and str(value).lower() not in ("mp", "ray"):
        yield Violation((EXECUTOR_ANNOTATION,), value, "mp or ray")


EXECUTOR_RULE = Rule(
    "podTemplate backend annotation must be mp or ray, case-insensitively",
    f"!('{EXECUTOR_ANNOTATION}' in self)"
    f" || self['{EXECUTOR_ANNOTATION}'].lowerAscii() in ['mp', 'ray']",
    at="annotations",
    check=_executor,
)


class PodMetadata(OpenModel):
    """Labels and annotations of pods."""

    annotations: StringMap = Field(default_factory=dict)
    """Annotations."""
    labels: StringMap = Field(default_factory=dict)
    """Labels."""

    rules = (EXECUTOR_RULE,)


class PodTemplateCore(OpenModel):
    """What the platform reads of a pod template."""

    metadata: PodMetadata | None = None
    """Labels and annotations of the pods."""
    spec: PodSpecCore | None = None
    """Specification of the pods."""


class ExtraPodSpecCore(PodSpecCore):
    """A v1alpha1 service's pod specification, with its main container beside the others."""

    main_container: MainContainer | None = None
    """The container that runs the service."""


class ProbeCore(OpenModel):
    """A Kubernetes probe, handed through."""

    initial_delay_seconds: Count | None = None
    """Seconds before the first probe."""
    period_seconds: Annotated[Count, Field(ge=1)] | None = None
    """Seconds between probes."""
    timeout_seconds: Annotated[Count, Field(ge=1)] | None = None
    """Seconds that one probe may take."""
    failure_threshold: Annotated[Count, Field(ge=1)] | None = None
    """Failures in a row that count."""


PodTemplate = Annotated[dict[str, Any], RawObject(PodTemplateCore)]
ExtraPodSpec = Annotated[dict[str, Any], RawObject(ExtraPodSpecCore)]
Probe = Annotated[dict[str, Any], RawObject(ProbeCore)]
