"""Deployments, and the worker hash that tells generations of workers apart.

Graphs with prefill and decode workers get one Deployment for each role and hash: a changed
worker makes new Deployments beside the old ones, so that a new prefill worker never serves an old
decode worker. So do engines over several nodes, in any graph: a LeaderWorkerSet of one group takes
it away before it makes the new one, or (up to lws v0.8, where a surge is wanted) rolls never. Other
workers roll in place. The hash stands on every worker's pods.
"""

from collections.abc import Mapping, Sequence

from dynamo_operator.render import names
from dynamo_operator.render.canonical import short_hash
from dynamo_operator.render.defaults.worker import STARTUP_SECONDS
from dynamo_operator.render.merge import Json, mapping
from dynamo_operator.render.overrides import Kept, Scale
from dynamo_operator.render.parts import Graph, Part

DEADLINE_SECONDS = STARTUP_SECONDS + 600
"""So long workers may come no further until that counts as standing still."""


def worker_hash(parts: Sequence[Part]) -> str:
    """8 hex digits over the rendered pod templates of all workers, replicas left out; the order
    of the components and of keys in maps does not matter."""
    return short_hash(
        {part.spec.name: [part.role, *part.templates.values()] for part in parts if part.is_worker}
    )


def is_split(parts: Sequence[Part]) -> bool:
    """Whether the graph's workers are split into prefill and decode."""
    return {"prefill", "decode"} <= {part.role for part in parts}


def generation(part: Part, parts: Sequence[Part], worker_hash: str, kept: Kept | None) -> str:
    """`worker_hash` where each generation of the part's pods has a workload of its own, else "".

    Kept templates stay in the workload that they run in: renaming it would replace its pods.
    """
    group = part.workload_kind == "LeaderWorkerSet" and (kept is None or kept.groups_apart)
    return worker_hash if part.is_worker and (group or is_split(parts)) else ""


def reused(part: Part, kept: Kept | None) -> Mapping[str, Json]:
    """The part's templates: those of an earlier rendering where they are kept and still fit."""
    old = kept.templates.get(part.spec.name) if kept is not None else None
    return old if old is not None and old.keys() == part.templates.keys() else part.templates


def stamped(template: Json, worker_hash: str, restart: str | None) -> Json:
    """`template` with the workers' hash as a label ("" for pods that are no workers) and the id of
    a restart as an annotation. Both stand outside of the hash."""
    metadata = dict(template["metadata"])
    if worker_hash:
        metadata["labels"] = {**metadata["labels"], names.WORKER_HASH_LABEL: worker_hash}
    if restart is not None:
        annotations = mapping(metadata.get("annotations"))
        metadata["annotations"] = {**annotations, names.RESTART_ANNOTATION: restart}
    return {**template, "metadata": metadata}


def workload_name(part: Part, graph: Graph, generation: str) -> str:
    """Name of what runs the part's pods, of its `generation`."""
    if part.workload_kind == "LeaderWorkerSet":
        return names.group_name(graph.name, part.spec.name, generation)
    name = names.object_name(graph.name, part.spec.name)
    return f"{name}-{generation}" if generation else name


def selector(part: Part, graph: Graph, generation: str) -> Json:
    """Labels that pick the pods of one workload."""
    labels = part.selector(graph)
    if generation:
        labels[names.WORKER_HASH_LABEL] = generation
    return labels


def workload_metadata(part: Part, graph: Graph, generation: str, scale: Scale) -> Json:
    """Metadata of a workload."""
    labels = dict(part.labels)
    if generation:
        labels[names.WORKER_HASH_LABEL] = generation
    metadata = graph.metadata(workload_name(part, graph, generation), labels)
    if scale.marker:
        annotations = mapping(metadata.get("annotations"))
        metadata["annotations"] = {**annotations, names.KEPT_REPLICAS_ANNOTATION: scale.marker}
    return metadata


def bounds(part: Part, graph: Graph) -> Json:
    """`maxSurge` and `maxUnavailable` as far as annotations give them: numbers or percentages."""
    found: Json = {}
    for key, annotation in (
        ("maxSurge", names.SURGE_ANNOTATION),
        ("maxUnavailable", names.UNAVAILABLE_ANNOTATION),
    ):
        value = graph.setting(annotation, part.spec)
        if value:
            found[key] = int(value) if value.isascii() and value.isdigit() else value
    return found


def deployment(part: Part, graph: Graph, generation: str, template: Json, scale: Scale) -> Json:
    """The component's Deployment of `template`."""
    spec: Json = {
        "selector": {"matchLabels": selector(part, graph, generation)},
        "template": template,
    }
    if scale.replicas is not None:
        spec["replicas"] = scale.replicas
    if part.is_worker:
        # Kubernetes' ten minutes would call every large model's start a failure.
        spec["progressDeadlineSeconds"] = DEADLINE_SECONDS
    rolling = bounds(part, graph)
    if rolling:
        spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": rolling}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": workload_metadata(part, graph, generation, scale),
        "spec": spec,
    }
