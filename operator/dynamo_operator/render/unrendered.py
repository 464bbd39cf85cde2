"""Fields that are accepted but not rendered: each gives a note, so that nothing is silent."""

from dynamo_crds import v1alpha1
from dynamo_crds.v1beta1 import Component, GraphSpec

from dynamo_operator.render import notes
from dynamo_operator.render.notes import Notes


def note_graph(spec: GraphSpec, noted: Notes) -> None:
    """Notes on the fields of the graph as a whole."""

    def say(reason: str, message: str) -> None:
        noted.add("", reason, message)

    if spec.priority_class_name:
        say(
            "PriorityClassNotRendered",
            "priorityClassName is for gang scheduling; set it in a podTemplate for plain pods",
        )
    if spec.topology_constraint is not None:
        say("TopologyConstraintNotRendered", "topologyConstraint has no effect on plain pods")
    if spec.provider_override is not None:
        say("ProviderOverrideNotRendered", "providerOverride has no workload provider to go to")
    if spec.experimental is not None and spec.experimental.kv_transfer_policy is not None:
        say("KvTransferPolicyNotRendered", "experimental.kvTransferPolicy has no effect")


def note_component(component: Component, noted: Notes) -> None:
    """Notes on a component's fields; the rest of the component is rendered."""
    name = component.name

    def say(what: str, message: str) -> None:
        noted.add(name, f"{what}NotRendered", message)

    if component.min_available is not None:
        say("MinAvailable", "minAvailable is for gang scheduling; plain pods start one by one")
    if component.topology_constraint is not None:
        say("TopologyConstraint", "topologyConstraint has no effect on plain pods")
    if component.provider_override is not None:
        say("ProviderOverride", "providerOverride has no workload provider to go to")
    experimental = component.experimental
    if experimental is not None:
        if experimental.gpu_memory_service is not None:
            say("GpuMemoryService", "experimental.gpuMemoryService: the pod keeps its own GPUs")
        if experimental.failover is not None:
            say("Failover", "experimental.failover: no standby engine is rendered")
        if experimental.checkpoint is not None and experimental.checkpoint.enabled:
            say("Checkpoint", "experimental.checkpoint: workers start from scratch")
        if experimental.grove is not None:
            say("Grove", "experimental.grove: pods are Deployments, not Grove's")
    multinode = component.multinode
    if multinode is not None and any(
        role is not None and role.provider_override is not None
        for role in (multinode.leader, multinode.worker)
    ):
        say("MultinodeProviderOverride", "multinode: providerOverride has no provider to go to")


def note_multinode(component: Component, noted: Notes) -> None:
    noted.add(
        component.name,
        notes.MULTINODE_NEEDS_LWS,
        "several nodes need LeaderWorkerSets, which are not installed (kubernetes-sigs/lws); the"
        " component is left out",
    )


def note_discovery(backend: str, noted: Notes) -> None:
    if backend not in ("", "kubernetes"):
        noted.add(
            "",
            notes.DISCOVERY_BACKEND_IGNORED,
            f"discovery backend {backend!r} is asked for; pods are found through Kubernetes",
        )


def note_v1alpha1(said: v1alpha1.GraphSpec, noted: Notes) -> None:
    """Notes on what a graph said in v1alpha1 that is not rendered."""
    for component, service in said.services.items():
        if service.ingress is not None and service.ingress.enabled:
            message = "ingress: route to the frontend's Service with an Ingress or HTTPRoute"
            noted.add(component, "IngressNotRendered", message)
