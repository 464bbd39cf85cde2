"""Deployments, and the worker hash that tells generations of workers apart.

Graphs with prefill and decode workers get one Deployment for each role and hash: a changed
worker makes new Deployments beside the old ones, so that a new prefill worker never serves an old
decode worker. Aggregated workers roll in place. The hash stands on every worker's pods.
"""

from collections.abc import Sequence

from dynamo_operator.render import names
from dynamo_operator.render.canonical import short_hash
from dynamo_operator.render.defaults.worker import STARTUP_SECONDS
from dynamo_operator.render.merge import Json, mapping
from dynamo_operator.render.parts import Graph, Part

PROGRESS_MARGIN_SECONDS = 600


def worker_hash(parts: Sequence[Part]) -> str:
    """8 hex digits over the rendered pod templates of all workers, replicas left out; the order
    of the components and of keys in maps does not matter."""
    return short_hash(
        {part.spec.name: [part.role, part.template] for part in parts if part.is_worker}
    )


def generations_apart(parts: Sequence[Part]) -> bool:
    """Whether the graph's workers are split into prefill and decode."""
    return {"prefill", "decode"} <= {part.role for part in parts}


def stamp(parts: Sequence[Part], worker_hash: str) -> None:
    """Put the hash on the workers' pods."""
    for part in parts:
        if part.is_worker:
            part.template["metadata"]["labels"][names.WORKER_HASH_LABEL] = worker_hash


def deployment(part: Part, graph: Graph, generation: str) -> Json:
    """The component's Deployment; `generation` is the worker hash where it is part of the name,
    else ""."""
    name = names.object_name(graph.name, part.spec.name)
    labels = dict(part.labels)
    selector = part.selector(graph)
    if generation and part.is_worker:
        name = f"{name}-{generation}"
        labels[names.WORKER_HASH_LABEL] = generation
        selector[names.WORKER_HASH_LABEL] = generation
    spec: Json = {
        "replicas": part.replicas,
        "selector": {"matchLabels": selector},
        "template": part.template,
    }
    if part.is_worker:
        # Kubernetes' ten minutes would call every large model's start a failure.
        spec["progressDeadlineSeconds"] = STARTUP_SECONDS + PROGRESS_MARGIN_SECONDS
    rolling = {
        key: value
        for key, annotation in (
            ("maxSurge", names.SURGE_ANNOTATION),
            ("maxUnavailable", names.UNAVAILABLE_ANNOTATION),
        )
        if (value := _setting(part, graph, annotation)) is not None
    }
    if rolling:
        spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": rolling}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": graph.metadata(name, labels),
        "spec": spec,
    }


def _setting(part: Part, graph: Graph, annotation: str) -> str | int | None:
    """The annotation's value: the component's pod template's, the graph's for all, the object's."""
    written = mapping(mapping(part.spec.pod_template).get("metadata"))
    for source in (
        mapping(written.get("annotations")),
        graph.spec.annotations,
        graph.metadata_annotations,
    ):
        value = source.get(annotation)
        if isinstance(value, str) and value:
            return int(value) if value.isascii() and value.isdigit() else value
    return None
