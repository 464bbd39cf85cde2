"""From what is observed of a graph to the plan for it. Pure: one `Observed` in, one `Plan` out.

The order of the decisions: which revision's templates run (the wanted ones, the kept ones of an
older operator, or the last good ones) · how many replicas each component has · how far the rollout
by generations may go · which restart stamps the pods carry · what is superfluous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynamo_crds.v1beta1 import DynamoGraphDeployment
from pydantic import ValidationError

from dynamo_operator.reconcile import progress, replicas, restart, revisions, rollout
from dynamo_operator.reconcile.observed import Json, Key, Observed
from dynamo_operator.reconcile.ownership import is_applied, stamped
from dynamo_operator.reconcile.plan import ComponentPlan, Plan, RestartPlan, Rollback
from dynamo_operator.reconcile.revisions import Revision
from dynamo_operator.render import (
    Kept,
    Platform,
    Rendered,
    RenderedComponent,
    Scale,
    names,
    render_with_notes,
)

ADAPTER = "DynamoGraphDeploymentScalingAdapter"
WORKLOADS = ("Deployment", "LeaderWorkerSet")


def plan(observed: Observed, platform: Platform) -> Plan:
    """What is to be true of the graph."""
    known = revisions.read(observed)
    secret = revisions.pairing_secret(known, observed.name)
    fresh = render_with_notes(observed.graph, platform, pairing_secret=secret)
    current, good, look_again_s = _current_revision(observed, known, fresh)
    kept = Kept(current.worker_hash, current.templates, current.groups_apart)
    graph = observed.graph
    rollback = None
    if current.state == revisions.FAILED and good is not None:
        rolled_back = _with_workers_of(graph, current, good)
        if rolled_back is not None:
            graph = rolled_back
            templates = {**current.templates, **_workers(good)}
            kept = Kept(good.worker_hash, templates, good.groups_apart)
            rollback = Rollback(current.worker_hash, good.worker_hash, current.reason)

    rendered = render_with_notes(graph, platform, kept=kept, pairing_secret=secret)
    live = {
        component.name: workload
        for component in rendered.components
        if (workload := observed.children.get((component.workload_kind, component.workload)))
    }
    old = _old_workloads(observed, rendered)
    decisions = _decide(observed, rendered, live, old)
    bounds = {component.name: _bounds(observed, component) for component in rendered.components}
    step = _step(rendered, decisions, live, old, bounds)
    restarts = restart.plan(
        graph.spec.restart,
        [component.name for component in rendered.components],
        live,
        observed.pods,
        _completed_restart(observed),
    )
    final = render_with_notes(
        graph,
        platform,
        kept=kept,
        pairing_secret=secret,
        scale={
            name: Scale(
                None if decision.yielded else step.new.get(name, decision.replicas),
                str(decision.marker or ""),
                decision.replicas,
            )
            for name, decision in decisions.items()
        },
        restarts=restarts.stamps if restarts is not None else {},
    )
    owned = tuple(
        stamped(_owned(manifest, observed)) for manifest in map(_without_number, final.manifests)
    )
    if rollback is None and not current.state and _works(observed, final, owned):
        current = replace(current, state=revisions.GOOD)
    owned = (stamped(_owned(current.manifest(observed), observed)), *owned)
    needed = (current, revisions.last_good(known, current))
    waits_s = [look_again_s, *(progress.look_again_s(w, observed.at) for w in live.values())]
    return Plan(
        manifests=owned,
        seeds=_seeds(final, decisions),
        scale={
            (kind, name): step.old[name]
            for kind, name, _, workload in old
            if name in step.old and int(workload["spec"].get("replicas", 1)) != step.old[name]
        },
        delete=_superfluous(
            observed, owned, final, old, step, revisions.superfluous(known, needed)
        ),
        components=tuple(
            _component(component, decisions[component.name], old) for component in final.components
        ),
        notes=tuple(fresh.notes),
        worker_hash=final.worker_hash,
        rollback=rollback,
        restart=restarts if restarts is not None and restarts.id else None,
        look_again_s=min((wait_s for wait_s in waits_s if wait_s is not None), default=None),
    )


# --- which templates


def _current_revision(
    observed: Observed, known: list[Revision], fresh: Rendered
) -> tuple[Revision, Revision | None, float | None]:
    """The revision of what is wanted, judged by what has become of it; the one to go back to should
    it have failed (None if there is none, or nobody wants to); in how many seconds to look again.
    """
    made = revisions.made(observed, fresh)
    current = revisions.current(observed, known, made)
    good = revisions.last_good(known, current) if _may_roll_back(observed) else None
    if current.state == revisions.FAILED and good is not None:
        return current, good, None  # its pods are gone and can't tell any more
    if current.state == revisions.GOOD:
        return current, good, None
    found = rollout.failing(observed, current.worker_hash, current.workers)
    if found.why and good is None and current.name != made.name:
        # It never worked, so there is nothing to keep: what is rendered now may.
        return replace(made, number=current.number + 1), None, None
    state = revisions.FAILED if found.why else ""
    return replace(current, state=state, reason=found.why), good, found.look_again_s


def _works(observed: Observed, final: Rendered, manifests: Sequence[Json]) -> bool:
    """Whether the rendered templates have shown that they work: every workload has them, all of its
    pods are available, and every kind of worker has at least one."""
    wanted = {(item["kind"], item["metadata"]["name"]): item for item in manifests}
    for component in final.components:
        key = component.workload_kind, component.workload
        live = observed.children.get(key)
        if live is None or not is_applied(wanted[key], live):
            return False
        if not restart.settled(live, observed.pods):
            return False
        if component.kind == "worker" and not _ready(live):
            return False
    return bool(final.components)


def _completed_restart(observed: Observed) -> str:
    """Id of the restart that the status says is over; "" for none."""
    said = observed.status.get("restart") or {}
    return str(said.get("observedID", "")) if said.get("phase") == restart.COMPLETED else ""


def _may_roll_back(observed: Observed) -> bool:
    return observed.annotations.get(names.ROLLBACK_ANNOTATION, "").lower() == "true"


def _workers(revision: Revision) -> dict[str, Mapping[str, Json]]:
    return {
        name: template for name, template in revision.templates.items() if name in revision.workers
    }


def _with_workers_of(
    graph: DynamoGraphDeployment, current: Revision, good: Revision
) -> DynamoGraphDeployment | None:
    """`graph` with the workers of `good` in place of its own; numbers stay the graph's. None if
    that makes no valid graph."""
    wanted = graph.manifest()
    numbers = {
        component["name"]: {
            key: component[key] for key in ("replicas", "scalingAdapter") if key in component
        }
        for component in wanted["spec"].get("components", [])
    }
    others = [
        component
        for component in wanted["spec"].get("components", [])
        if component["name"] not in (*current.workers, *good.workers)
    ]
    workers = []
    for component in good.spec.get("components", []):
        name = component.get("name")
        if name in good.workers:
            size = numbers.get(name)
            plain = {
                key: value
                for key, value in component.items()
                if size is None or key not in ("replicas", "scalingAdapter")
            }
            workers.append({**plain, **(size or {})})
    spec: dict[str, Any] = {**wanted["spec"], "components": [*others, *workers]}
    if "restart" in spec:  # its order is about other components, perhaps
        spec["restart"] = {"id": spec["restart"]["id"]}
    try:
        return DynamoGraphDeployment.model_validate({**wanted, "spec": spec})
    except ValidationError:
        return None


# --- numbers


OldWorkload = tuple[str, str, str, Json]
"""kind, name, component and the object: a worker's workload of an earlier generation."""


def _old_workloads(observed: Observed, rendered: Rendered) -> list[OldWorkload]:
    """Workloads of workers that the current rendering does not have; those to be given up first
    at the front: of generations of which less is ready."""
    current = {(component.workload_kind, component.workload) for component in rendered.components}
    found: list[OldWorkload] = []
    for kind in WORKLOADS:
        for workload in observed.of_kind(kind):
            name = workload["metadata"]["name"]
            labels = workload["metadata"].get("labels") or {}
            if (kind, name) in current or labels.get(names.CLASS_LABEL) != "worker":
                continue
            if workload["metadata"].get("deletionTimestamp"):
                continue
            found.append((kind, name, labels.get(names.COMPONENT_LABEL, ""), workload))

    ready: dict[str, int] = {}
    for _, _, _, workload in found:
        generation = _hash(workload)
        ready[generation] = min(ready.get(generation, 1 << 30), _ready(workload))
    return sorted(found, key=lambda entry: (ready[_hash(entry[3])], _hash(entry[3]), entry[1]))


def _hash(workload: Json) -> str:
    return str((workload["metadata"].get("labels") or {}).get(names.WORKER_HASH_LABEL, ""))


def _ready(workload: Json) -> int:
    status = workload.get("status") or {}
    return int(status.get("availableReplicas", status.get("readyReplicas", 0)) or 0)


def _counts(component: str, name: str, workload: Json) -> rollout.Workload:
    number = int((workload.get("spec") or {}).get("replicas", 1))
    return rollout.Workload(name, component, number, _ready(workload))


def _decide(
    observed: Observed,
    rendered: Rendered,
    live: Mapping[str, Json],
    old: Sequence[OldWorkload],
) -> dict[str, replicas.Decision]:
    found = {}
    wanted = {component.name: component for component in observed.graph.spec.components}
    for component in rendered.components:
        earlier = next((w for _, _, name, w in reversed(old) if name == component.name), None)
        workload = live.get(component.name)
        spec = wanted.get(component.name)
        number = None
        if spec is not None and spec.scaling_adapter is not None:
            rolling = earlier is not None
            number = _adapter_number(observed, component, workload or earlier, rolling)
        found[component.name] = replicas.decide(component.replicas, number, workload, earlier)
    return found


def _adapter_number(
    observed: Observed,
    component: RenderedComponent,
    workload: Json | None,
    rolling: bool,
) -> int:
    """The adapter's number; of one that is yet to be made, what runs: that is where it begins.
    While two generations share the component's pods (`rolling`), no workload tells that."""
    name = names.adapter_name(observed.name, component.name)
    adapter = observed.children.get((ADAPTER, name))
    if adapter is not None and not adapter["metadata"].get("deletionTimestamp"):
        return int(adapter["spec"]["replicas"])
    if workload is not None and replicas.is_yielded(workload):
        return replicas.number(workload)
    marker = replicas.Marker.of(workload)
    if marker is not None and marker.kept is not None:
        return marker.kept
    if workload is not None and not rolling:
        return replicas.number(workload)
    return component.replicas


def _bounds(observed: Observed, component: RenderedComponent) -> rollout.Bounds:
    """Surge and unavailability: upstream's annotations on the pod template or the graph."""
    template = next(iter(component.templates.values()), {})
    sources = (
        (template.get("metadata") or {}).get("annotations") or {},
        observed.graph.spec.annotations,
        observed.annotations,
    )

    def setting(annotation: str) -> str:
        return next((source[annotation] for source in sources if source.get(annotation)), "25%")

    return rollout.Bounds(setting(names.SURGE_ANNOTATION), setting(names.UNAVAILABLE_ANNOTATION))


def _step(
    rendered: Rendered,
    decisions: Mapping[str, replicas.Decision],
    live: Mapping[str, Json],
    old: Sequence[OldWorkload],
    bounds: Mapping[str, rollout.Bounds],
) -> rollout.Step:
    """Numbers for workers while an earlier generation is there; none where there is none."""
    if not old:
        return rollout.Step({}, {})
    workers = [c.name for c in rendered.components if c.kind == "worker"]
    wanted = {name: decisions[name].replicas for name in workers}
    new = {
        component.name: _counts(component.name, component.workload, live[component.name])
        for component in rendered.components
        if component.name in workers and component.name in live
    }
    given_up = [_counts(component, name, workload) for _, name, component, workload in old]
    together = rollout.step(wanted, new, given_up, bounds)
    if rendered.generation:
        return together
    # Each serves without the others.
    alone = [
        rollout.step(
            {name: wanted[name]}, new, [w for w in given_up if w.component == name], bounds
        )
        for name in workers
    ]
    return rollout.Step(
        {name: number for step in alone for name, number in step.new.items()},
        {**together.old, **{n: number for step in alone for n, number in step.old.items()}},
    )


# --- the objects


def _without_number(manifest: Json) -> Json:
    """An adapter's number is whoever's scales it; only its first one is ours (`_seeds`)."""
    if manifest["kind"] != ADAPTER:
        return manifest
    spec = {key: value for key, value in manifest["spec"].items() if key != "replicas"}
    return {**manifest, "spec": spec}


def _seeds(final: Rendered, decisions: Mapping[str, replicas.Decision]) -> dict[Key, int]:
    """The numbers that new adapters begin with."""
    return {
        (ADAPTER, manifest["metadata"]["name"]): decisions[
            manifest["spec"]["dgdRef"]["componentName"]
        ].replicas
        for manifest in final.manifests
        if manifest["kind"] == ADAPTER
    }


def _owned(manifest: Json, observed: Observed) -> Json:
    """`manifest` as a child of the graph: garbage collection deletes it with the graph."""
    owner = {
        "apiVersion": observed.raw["apiVersion"],
        "kind": observed.raw["kind"],
        "name": observed.name,
        "uid": observed.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [owner]}}


def _superfluous(
    observed: Observed,
    manifests: Sequence[Json],
    final: Rendered,
    old: Sequence[OldWorkload],
    step: rollout.Step,
    old_revisions: Sequence[str],
) -> tuple[Key, ...]:
    """Children to delete: what is not rendered any more, old generations once they are empty. What
    belongs to a component that still serves, or that can't be rendered just now, stays."""
    wanted = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    emptied = {
        (kind, name)
        for kind, name, _, workload in old
        if step.old.get(name) == 0
        and int(workload["spec"].get("replicas", 1)) == 0
        and int((workload.get("status") or {}).get("replicas", 0) or 0) == 0
    }
    serving = {component for kind, name, component, _ in old if (kind, name) not in emptied}
    serving |= {component.name for component in final.components if not component.workload_kind}
    result: list[Key] = []
    for key, child in sorted(observed.children.items()):
        metadata = child["metadata"]
        if key in wanted or metadata.get("deletionTimestamp"):
            continue
        component = (metadata.get("labels") or {}).get(names.COMPONENT_LABEL)
        if component in serving and key not in emptied and key[0] != ADAPTER:
            continue
        if key[0] == "ControllerRevision" and key[1] not in old_revisions:
            continue
        if key[0] == "PersistentVolumeClaim":
            continue  # what a volume holds is not given up for an edit; it goes with the graph
        if _is_away(child, observed):
            continue
        result.append(key)
    return tuple(result)


def _is_away(child: Json, observed: Observed) -> bool:
    """Whether the API server does not serve the child's kind at the moment."""
    kind = f"{child['apiVersion'].partition('/')[0]}/{child['kind']}"
    return kind in names.OPTIONAL_KINDS and kind not in observed.apis


def _component(
    component: RenderedComponent, decision: replicas.Decision, old: Sequence[OldWorkload]
) -> ComponentPlan:
    ruled = decision.by not in ("graph", "kept", "outlived")
    differs = component.replicas != decision.replicas
    return ComponentPlan(
        name=component.name,
        kind=component.kind,
        role=component.role,
        workload_kind=component.workload_kind,
        workload=component.workload,
        replicas=decision.replicas,
        scaled_by=decision.by,
        ignored_replicas=component.replicas if ruled and differs else None,
        renumbered=decision.renumbered,
        old_workloads=tuple(name for _, name, owner, _ in old if owner == component.name),
    )


__all__ = ["ADAPTER", "RestartPlan", "plan"]
