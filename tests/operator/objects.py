"""Kubernetes objects as the API server shows them, for tests: workloads, and pods in every plight.

Texts of waiting and terminated containers and of the scheduler are Kubernetes' own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.reconcile.ownership import APPLIED_ANNOTATION
from dynamo_operator.reconcile.plan import ComponentPlan, Plan

GRAPH_LABEL = "nvidia.com/dynamo-graph-deployment-name"
COMPONENT_LABEL = "nvidia.com/dynamo-component"
CLASS_LABEL = "nvidia.com/dynamo-component-class"
HASH_LABEL = "nvidia.com/dynamo-worker-hash"

HASH = "aaaaaaaa"
CREATED = "2026-01-01T00:00:00Z"
STARTED = "2026-01-01T00:00:10Z"
LATER = "2026-01-01T01:00:00Z"
IMAGE = "dynamo-platform/worker-vllm:1"


# --- the graph


def graph_raw(
    components: list[Json] | None = None,
    *,
    name: str = "g",
    generation: int = 1,
    status: Json | None = None,
    annotations: dict[str, str] | None = None,
) -> Json:
    """A graph as the API server has it; a frontend and a worker where nothing else is given."""
    wanted = components or [
        {"name": "frontend", "type": "frontend"},
        {"name": "worker", "type": "worker"},
    ]
    raw: Json = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {
            "name": name,
            "namespace": "team-a",
            "uid": "11111111-1111-4111-8111-111111111111",
            "generation": generation,
            "creationTimestamp": CREATED,
        },
        "spec": {"components": wanted},
    }
    if annotations:
        raw["metadata"]["annotations"] = annotations
    if status is not None:
        raw["status"] = status
    return raw


def observed(
    *children: Json, pods: list[Json] | tuple[Json, ...] = (), raw: Json | None = None
) -> Observed:
    """A graph (`graph_raw` by default) with what exists of it."""
    raw = raw or graph_raw()
    bare = {key: value for key, value in raw.items() if key != "status"}
    return Observed(
        graph=DynamoGraphDeployment.model_validate(bare),
        raw=raw,
        children={(child["kind"], child["metadata"]["name"]): child for child in children},
        pods=tuple(pods),
    )


def with_status(seen: Observed, status: Json, generation: int | None = None) -> Observed:
    """`seen` after `status` was written (and, perhaps, the graph's spec changed)."""
    metadata = {**seen.raw["metadata"], "generation": generation or seen.generation}
    return replace(seen, raw={**seen.raw, "metadata": metadata, "status": status})


def component(name: str = "worker", replicas: int = 1, **fields: Any) -> ComponentPlan:
    """A component's plan; its kind is its name unless given."""
    kind = fields.pop("kind", "worker" if name not in ("frontend", "epp", "planner") else name)
    settings: dict[str, Any] = {
        "kind": kind,
        "role": kind,
        "workload_kind": "Deployment",
        "workload": f"g-{name.lower()}",
        **fields,
    }
    return ComponentPlan(name=name, replicas=replicas, **settings)


def plan(*components: ComponentPlan, **fields: Any) -> Plan:
    """A plan of a frontend and a worker, where no components are given."""
    return Plan(components=components or (component("frontend"), component()), **fields)


# --- workloads


def deployment(
    name: str = "worker",
    wanted: int = 1,
    *,
    object_name: str = "",
    updated: int | None = None,
    available: int | None = None,
    replicas: int | None = None,
    generation: int = 2,
    seen: int | None = None,
    mark: str = "",
    stalled: bool = False,
    refused: str = "",
) -> Json:
    """A component's Deployment; all of its pods are updated and available unless said otherwise."""
    replicas = wanted if replicas is None else replicas
    updated = replicas if updated is None else updated
    available = min(replicas, wanted) if available is None else available
    conditions: list[Json] = [
        {
            "type": "Available",
            "status": "True" if available >= wanted else "False",
            "reason": "MinimumReplicasAvailable",
            "message": "",
            "lastUpdateTime": STARTED,
            "lastTransitionTime": STARTED,
        },
        {
            "type": "Progressing",
            "status": "False" if stalled else "True",
            "reason": "ProgressDeadlineExceeded" if stalled else "ReplicaSetUpdated",
            "message": f'ReplicaSet "g-{name}-5d9c7b" has timed out progressing.'
            if stalled
            else "",
            "lastUpdateTime": STARTED,
            "lastTransitionTime": STARTED,
        },
    ]
    if refused:
        conditions.append(
            {
                "type": "ReplicaFailure",
                "status": "True",
                "reason": "FailedCreate",
                "message": f'pods "g-{name}-5d9c7b-x7k2p" is forbidden: {refused}',
                "lastTransitionTime": STARTED,
            }
        )
    counts = {
        "replicas": replicas,
        "updatedReplicas": updated,
        "readyReplicas": available,
        "availableReplicas": available,
        "unavailableReplicas": max(0, wanted - available),
    }
    metadata: Json = {
        "name": object_name or f"g-{name.lower()}",
        "namespace": "team-a",
        "uid": f"deployment-{object_name or name}",
        "generation": generation,
        "labels": {GRAPH_LABEL: "g", COMPONENT_LABEL: name},
    }
    if mark:
        metadata["annotations"] = {APPLIED_ANNOTATION: mark}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": wanted,
            "template": {"metadata": {"labels": {COMPONENT_LABEL: name, HASH_LABEL: HASH}}},
        },
        # Kubernetes leaves out counts of zero.
        "status": {
            "observedGeneration": generation if seen is None else seen,
            **{key: value for key, value in counts.items() if value},
            "conditions": conditions,
        },
    }


def leader_worker_set(
    name: str = "worker",
    wanted: int = 1,
    *,
    ready: int | None = None,
    updated: int | None = None,
    updating: bool = False,
    progressing: str = "",
) -> Json:
    """A component's LeaderWorkerSet; its counts are engines. `progressing`: since when."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {
            "name": f"g-{name}",
            "namespace": "team-a",
            "generation": 1,
            "labels": {GRAPH_LABEL: "g", COMPONENT_LABEL: name},
        },
        "spec": {
            "replicas": wanted,
            "leaderWorkerTemplate": {
                "size": 2,
                "leaderTemplate": {"metadata": {"labels": {HASH_LABEL: HASH}}},
            },
        },
        "status": {
            "replicas": wanted,
            "readyReplicas": wanted if ready is None else ready,
            "updatedReplicas": wanted if updated is None else updated,
            "conditions": [
                {"type": "UpdateInProgress", "status": "True" if updating else "False"},
                *(
                    [{"type": "Progressing", "status": "True", "lastTransitionTime": progressing}]
                    if progressing
                    else []
                ),
            ],
        },
    }


def adapter(name: str = "worker", replicas: int = 1, *, generation: int = 1, **status: Any) -> Json:
    """A component's scaling adapter."""
    result: Json = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeploymentScalingAdapter",
        "metadata": {"name": f"g-{name}", "namespace": "team-a", "generation": generation},
        "spec": {"replicas": replicas, "dgdRef": {"name": "g", "componentName": name}},
    }
    if status:
        result["status"] = status
    return result


# --- pods


def pod(
    name: str = "worker",
    *,
    number: int = 0,
    phase: str = "Running",
    conditions: dict[str, Json] | None = None,
    statuses: list[Json] | None = None,
    init_statuses: list[Json] | None = None,
    node: str = "node-1",
    main: Json | None = None,
    spec: Json | None = None,
    **status: Any,
) -> Json:
    """A component's pod; `conditions` by type."""
    containers = [{"name": "main", "image": IMAGE, **(main or {})}]
    result: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"g-{name}-5d9c7b-{number:05d}",
            "namespace": "team-a",
            "uid": f"pod-{name}-{number}",
            "creationTimestamp": CREATED,
            "labels": {
                GRAPH_LABEL: "g",
                COMPONENT_LABEL: name,
                HASH_LABEL: HASH,
                **({CLASS_LABEL: "worker"} if name == "worker" else {}),
            },
            "ownerReferences": [{"kind": "ReplicaSet", "name": f"g-{name}-5d9c7b"}],
        },
        "spec": {"containers": containers, **({"nodeName": node} if node else {}), **(spec or {})},
        "status": {
            "phase": phase,
            "conditions": [
                {"type": type, "lastTransitionTime": CREATED, **fields}
                for type, fields in (conditions or {}).items()
            ],
            **status,
        },
    }
    if statuses is not None:
        result["status"]["containerStatuses"] = statuses
    if init_statuses is not None:
        result["status"]["initContainerStatuses"] = init_statuses
    return result


def container(
    state: Json, *, name: str = "main", ready: bool = False, restarts: int = 0, **fields: Any
) -> Json:
    """A container's status."""
    return {
        "name": name,
        "image": IMAGE,
        "imageID": "",
        "ready": ready,
        "restartCount": restarts,
        "state": state,
        "lastState": {},
        **fields,
    }


def waiting(reason: str, message: str = "") -> Json:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def terminated(code: int = 1, message: str = "", reason: str = "Error") -> Json:
    ended: Json = {"exitCode": code, "reason": reason, "startedAt": STARTED, "finishedAt": LATER}
    return {"terminated": {**ended, "message": message} if message else ended}


RUNNING: Json = {"running": {"startedAt": STARTED}}
_PLACED: dict[str, Json] = {"PodScheduled": {"status": "True"}}
_NOT_READY: Json = {
    "status": "False",
    "reason": "ContainersNotReady",
    "message": "containers with unready status: [main]",
}


def pod_ready(name: str = "worker", **fields: Any) -> Json:
    """A pod that serves."""
    conditions = {**_PLACED, "Ready": {"status": "True", "lastTransitionTime": LATER}}
    return pod(
        name,
        conditions=conditions,
        statuses=[container(RUNNING, ready=True, started=True)],
        **fields,
    )


def pods_of_group(number: int = 0, *, template: str = HASH, ready: bool = True) -> list[Json]:
    """The two pods of one group of the component "worker", made from the template `template` (its
    worker hash)."""
    make = pod_ready if ready else pod_starting
    found = [make(number=2 * number + node) for node in range(2)]
    for node, pod in enumerate(found):
        pod["metadata"]["labels"] |= {
            HASH_LABEL: template,
            "leaderworkerset.sigs.k8s.io/name": "g-worker",
            "leaderworkerset.sigs.k8s.io/worker-index": str(node),
        }
    return found


def pod_starting(name: str = "worker", **fields: Any) -> Json:
    """A pod whose container runs and has not passed its startup probe."""
    return pod(
        name,
        conditions={**_PLACED, "Ready": _NOT_READY},
        statuses=[container(RUNNING, started=False)],
        **fields,
    )


def pod_unready(name: str = "worker", *, was_ready: bool = False, **fields: Any) -> Json:
    """A pod whose readiness probe fails."""
    turned = LATER if was_ready else CREATED
    return pod(
        name,
        conditions={**_PLACED, "Ready": {**_NOT_READY, "lastTransitionTime": turned}},
        statuses=[container(RUNNING, started=True)],
        **fields,
    )


def pod_unschedulable(
    name: str = "worker",
    message: str = (
        "0/4 nodes are available: 4 Insufficient nvidia.com/gpu. preemption: 0/4 nodes are"
        " available: 4 No preemption victims found for incoming pod."
    ),
    gpus: str | int = "1",
    **fields: Any,
) -> Json:
    """A pod that fits on no node."""
    scheduled = {"status": "False", "reason": "Unschedulable", "message": message}
    return pod(
        name,
        phase="Pending",
        conditions={"PodScheduled": scheduled},
        node="",
        main={"resources": {"limits": {"nvidia.com/gpu": gpus}}},
        **fields,
    )


def pod_waiting(
    name: str = "worker", reason: str = "ContainerCreating", message: str = "", **fields: Any
) -> Json:
    """A pod whose container waits for something."""
    return pod(
        name,
        phase="Pending",
        conditions={**_PLACED, "Ready": _NOT_READY, **fields.pop("conditions", {})},
        statuses=[container(waiting(reason, message))],
        **fields,
    )


def pod_unpullable(name: str = "worker", **fields: Any) -> Json:
    """A pod whose image does not exist, between two tries."""
    image = "registry.example/llm:none"
    cause = (
        f'rpc error: code = NotFound desc = failed to pull and unpack image "{image}": failed to'
        f' resolve reference "{image}": {image}: not found'
    )
    message = f'Back-off pulling image "{image}": ErrImagePull: {cause}'
    return pod_waiting(name, "ImagePullBackOff", message, main={"image": image}, **fields)


def pod_crashing(
    name: str = "worker",
    message: str = "loading\nRuntimeError: CUDA out of memory\n",
    *,
    code: int = 1,
    reason: str = "Error",
    restarts: int = 5,
    moment: str = "waiting",
    **fields: Any,
) -> Json:
    """A pod whose container crashes; `moment`: "waiting" in between, "running" again, "ended"."""
    ended = terminated(code, message, reason)
    back_off = waiting("CrashLoopBackOff", "back-off 2m40s restarting failed container=main")
    state, last = {
        "waiting": (back_off, ended),
        "running": (RUNNING, ended),
        "ended": (ended, {}),
    }[moment]
    return pod(
        name,
        conditions={**_PLACED, "Ready": _NOT_READY},
        statuses=[container(state, restarts=restarts, lastState=last, started=moment == "running")],
        **fields,
    )


def pod_evicted(name: str = "worker", **fields: Any) -> Json:
    """A pod that its node has given up."""
    return pod(
        name,
        phase="Failed",
        reason="Evicted",
        message="The node was low on resource: memory. Threshold quantity: 100Mi",
        **fields,
    )
