"""The facts that all conditions are made of, derived once from what is observed and planned.

Counts come from the workloads' own controllers, which alone know which pods run the current
template; pods only tell why some are missing. A workload counts as current only if it carries the
mark of the manifest that is wanted now and its controller has seen it: so nothing is called done
between a change of the graph and the first pod that it moves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynamo_operator.diagnosis import pods
from dynamo_operator.diagnosis.fields import condition, count, label, text
from dynamo_operator.diagnosis.pods import Group, Trouble
from dynamo_operator.diagnosis.wording import one_line
from dynamo_operator.reconcile import groups, progress
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.reconcile.ownership import APPLIED_ANNOTATION
from dynamo_operator.reconcile.plan import ComponentPlan, Plan, Refused
from dynamo_operator.render import names
from dynamo_operator.render.notes import RUNTIME_UNSUPPORTED, Note

DEPLOYMENT = "Deployment"
LEADER_WORKER_SET = "LeaderWorkerSet"
WORKLOADS = (DEPLOYMENT, LEADER_WORKER_SET)


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment or LeaderWorkerSet as its controller last reported it."""

    kind: str
    name: str
    seen: bool
    """Whether its controller has seen its latest spec."""
    wanted: int
    """Replicas in its spec. Replicas are pods, or engines of several pods (LeaderWorkerSet)."""
    replicas: int
    updated: int
    """Replicas of the latest template."""
    ready: int
    available: int
    updating: bool
    """Whether replicas of an earlier template are there."""
    stalled: str
    """Not "": no progress within the deadline, in the controller's words if it has any."""
    trouble: Trouble | None
    """Why its controller can't create pods."""

    @property
    def runs(self) -> bool:
        """Whether it has replicas or is to have some."""
        return bool(self.replicas or self.wanted)


@dataclass(frozen=True, slots=True)
class Component:
    """One component: what it is meant to be and what is there."""

    plan: ComponentPlan
    current: Workload | None
    """The workload that runs the current template, if it exists."""
    old: tuple[Workload, ...]
    """Workloads of earlier generations that run."""
    applied: bool
    """Whether the current workload is what is wanted now."""
    groups: tuple[Group, ...]
    """Troubles of its pods, the most telling first; none once the component is settled."""
    refused: tuple[Refused, ...]
    """Writes for it that were refused."""
    notes: tuple[Note, ...]

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def noun(self) -> str:
        """What its replicas are."""
        return "engines" if self.plan.workload_kind == LEADER_WORKER_SET else "pods"

    @property
    def workloads(self) -> tuple[Workload, ...]:
        return (self.current, *self.old) if self.current else self.old

    @property
    def ready(self) -> int:
        """Ready replicas of all generations."""
        return sum(workload.ready for workload in self.workloads)

    @property
    def available(self) -> int:
        """Available replicas of all generations."""
        return sum(workload.available for workload in self.workloads)

    @property
    def updated(self) -> int:
        """Replicas of the current template, as far as that is known."""
        return self.current.updated if self.current and self.seen else 0

    @property
    def rendered(self) -> bool:
        """Whether anything runs for it at all."""
        return bool(self.plan.workload_kind and self.plan.workload)

    @property
    def seen(self) -> bool:
        """Whether the current workload is what is wanted, and its controller knows."""
        return self.current is not None and self.applied and self.current.seen

    @property
    def rolling(self) -> bool:
        """Whether replicas of an earlier template or generation are there."""
        return bool(self.old) or (self.current is not None and self.current.updating)

    @property
    def settled(self) -> bool:
        """Whether all wanted replicas are available, of the current template, and no others."""
        current = self.current
        return (
            current is not None
            and self.seen
            and not self.old
            and {
                current.replicas,
                current.updated,
                current.available,
            }
            == {self.plan.replicas}
        )

    @property
    def stalled(self) -> str:
        """Why nothing has come up within the deadline; "" if that has not passed."""
        if self.settled or self.current is None or not self.seen:
            return ""
        return self.current.stalled

    @property
    def unsupported(self) -> str:
        """Why nobody can tell whether requests reach it; "" if that is known."""
        found = (note.message for note in self.notes if note.reason == RUNTIME_UNSUPPORTED)
        return next(found, "")

    @property
    def faults(self) -> Iterator[Group]:
        """The troubles that are more than a start that takes its time."""
        return (group for group in self.groups if group.trouble.fault)


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """One graph."""

    observed: Observed
    plan: Plan
    components: tuple[Component, ...]
    """In the plan's order."""
    leaving: tuple[str, ...]
    """Workloads of components that are wanted no more, as `Deployment/name`, while they run."""

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Writes that were refused: for good first, then those that may pass."""
        return tuple(sorted(self.plan.refused, key=lambda refusal: refusal.transient))

    def of_kind(self, *kinds: str) -> Iterator[Component]:
        """The components of these kinds."""
        return (component for component in self.components if component.plan.kind in kinds)


@dataclass(frozen=True, slots=True)
class ComponentFacts:
    """One component, in its graph."""

    graph: GraphFacts
    it: Component


def gather(observed: Observed, plan: Plan) -> GraphFacts:
    """The facts about one graph."""
    marks = {
        (text(manifest, "kind"), text(manifest, "metadata", "name")): _mark(manifest)
        for manifest in plan.manifests
    }
    components = tuple(_component(item, observed, plan, marks) for item in plan.components)
    mine = {(w.kind, w.name) for component in components for w in component.workloads}
    leaving = tuple(
        f"{kind}/{name}"
        for (kind, name), child in sorted(observed.children.items())
        if kind in WORKLOADS
        and (kind, name) not in mine
        and workload(kind, name, child, observed).runs
    )
    return GraphFacts(observed, plan, components, leaving)


def workload(kind: str, name: str, child: Mapping[str, Any], observed: Observed) -> Workload:
    """What a workload of the observed graph says of itself."""
    generation = count(child, "metadata", "generation")
    replicas = count(child, "status", "replicas")
    updated = count(child, "status", "updatedReplicas")
    ready = count(child, "status", "readyReplicas")
    return Workload(
        kind=kind,
        name=name,
        seen=(
            groups.is_current(child, observed.pods)
            if kind == LEADER_WORKER_SET
            else count(child, "status", "observedGeneration") >= generation
        ),
        wanted=count(child, "spec", "replicas", default=1),
        replicas=replicas,
        updated=updated,
        ready=ready,
        available=(
            ready if kind == LEADER_WORKER_SET else count(child, "status", "availableReplicas")
        ),
        updating=(groups.is_updating(child) if kind == LEADER_WORKER_SET else replicas > updated),
        stalled=progress.standstill(child, observed.at),
        trouble=_failure(condition(child, "ReplicaFailure")),
    )


def workloads(
    plan: ComponentPlan, observed: Observed
) -> tuple[Workload | None, tuple[Workload, ...]]:
    """The component's workload of the current template, and those of earlier generations that
    run."""
    key = (plan.workload_kind, plan.workload)
    current = observed.children.get(key)
    old = (
        workload(kind, name, observed.children[kind, name], observed)
        for name in plan.old_workloads
        for kind in WORKLOADS
        if (kind, name) in observed.children and (kind, name) != key
    )
    return (
        workload(*key, current, observed) if current is not None else None,
        tuple(item for item in old if item.runs),
    )


def _component(
    plan: ComponentPlan, observed: Observed, whole: Plan, marks: Mapping[tuple[str, str], str]
) -> Component:
    key = (plan.workload_kind, plan.workload)
    current, old = workloads(plan, observed)
    mark = marks.get(key, "")
    found = Component(
        plan=plan,
        current=current,
        old=old,
        applied=not mark or _mark(observed.children.get(key)) == mark,
        groups=(),
        refused=tuple(refusal for refusal in whole.refused if _is_about(refusal, plan)),
        notes=tuple(note for note in whole.notes if note.component == plan.name),
    )
    return found if found.settled else replace(found, groups=_groups(found, observed))


def _mark(manifest: Any) -> str:
    return text(manifest, "metadata", "annotations", APPLIED_ANNOTATION)


def _is_about(refusal: Refused, plan: ComponentPlan) -> bool:
    """Whether the refusal keeps the component from being what is wanted."""
    if refusal.object == f"{plan.workload_kind}/{plan.workload}":
        return True
    return bool(plan.name) and refusal.component == plan.name


def _groups(component: Component, observed: Observed) -> tuple[Group, ...]:
    mine: Sequence[Json] = [
        pod
        for pod in observed.pods
        if label(pod, names.COMPONENT_LABEL) == component.name and not pods.is_leaving(pod)
    ]
    living = [pod for pod in mine if not pods.has_ended(pod)]
    # Pods that ended lie about for a while; they tell nothing once others have taken their place.
    replaced = len(living) >= sum(item.wanted for item in component.workloads)
    found = pods.grouped(component.name, living if replaced else mine)
    for item in component.workloads:
        if item.trouble is not None:
            found.append(Group(item.trouble, 0, len(living), component.name))
    return tuple(sorted(found, key=lambda group: group.trouble.rank))


def _failure(failure: Mapping[str, Any]) -> Trouble | None:
    """A Deployment's condition ReplicaFailure: pods that the API server does not let it create."""
    if failure.get("status") != "True":
        return None
    # 'pods "g-worker-5d9c-x7k2p" is forbidden: exceeded quota: …': the name is another each time.
    message = one_line(text(failure, "message"))
    why = message.split(" is forbidden: ", 1)[-1] or "the API server refuses them"
    if "exceeded quota" in why:
        return Trouble("QuotaExceeded", f"{why}; raise the quota or ask for less", "cluster")
    return Trouble("FailedCreate", why, "cluster")
