"""The conditions of one component, and what keeps it from being Ready.

Available: somebody serves. Routable: requests reach it. ScalingActive: somebody other than the
graph says how many. They stand in `status.components.<name>.conditions`.
"""

from dynamo_operator.diagnosis.fields import at, items, text
from dynamo_operator.diagnosis.wording import sentences
from dynamo_operator.reconcile.plan import Refused
from dynamo_operator.render import names
from dynamo_operator.status.facts import ComponentFacts
from dynamo_operator.status.verdict import Verdict, chain

GRAPH_REPLICAS_IGNORED = "GraphReplicasIgnored"
ROUTED = ("frontend", "epp", "worker")
"""Kinds of components that requests pass through."""
PICKERS = ("frontend", "epp")

# Reasons of the graph's condition Ready: Dynamo's own, so that what matches on them goes on.
ALL_READY = "all_resources_are_ready"
SOME_NOT_READY = "some_resources_are_not_ready"
NO_CAPACITY = "insufficient_capacity"
PODS_NOT_READY = "pods_not_ready"
UPDATING = "updating"
MIXED = "mixed_not_ready_reasons"


# --- Available


def available(facts: ComponentFacts) -> Verdict:
    """True while at least one replica, of whatever generation, is available."""
    found = chain(facts, _some_available, _scaled_to_zero, _pods_fail, _not_created)
    return found or Verdict("False", "NoneAvailable", f"no {facts.it.name} {facts.it.noun} yet")


def _some_available(facts: ComponentFacts) -> Verdict | None:
    it = facts.it
    if not it.available:
        return None
    message = f"{it.available} of {it.plan.replicas} {it.noun} are available"
    earlier = sum(workload.available for workload in it.old)
    if earlier:
        message += f", {earlier} of them of an earlier generation"
    return Verdict("True", "ReplicasAvailable", message)


def _scaled_to_zero(facts: ComponentFacts) -> Verdict | None:
    if facts.it.plan.replicas:
        return None
    return Verdict("False", "ScaledToZero", f"{facts.it.name} is scaled to zero")


def _pods_fail(facts: ComponentFacts) -> Verdict | None:
    group = next(iter(facts.it.groups), None)
    return Verdict("False", group.trouble.reason, str(group)) if group else None


def _not_created(facts: ComponentFacts) -> Verdict | None:
    if facts.it.current is not None:
        return None
    return Verdict("False", "NotCreated", _missing(facts))


# --- Routable


def routable(facts: ComponentFacts) -> Verdict | None:
    """True while requests reach a ready replica; None for components that take no requests.

    A frontend or picker is reached once one of its pods is ready. A worker is ready once a picker
    follows it, but that picker may be gone: one has to be ready too, if the graph has any. That a
    worker turned ready after a minute without a picker can't be seen here; its metric tells.
    """
    if facts.it.plan.kind not in ROUTED:
        return None
    found = chain(facts, _scaled_to_zero, _none_ready, _runtime_unsupported, _no_picker)
    return found or Verdict("True", "Routable", f"{facts.it.ready} {facts.it.noun} take requests")


def _none_ready(facts: ComponentFacts) -> Verdict | None:
    if facts.it.ready:
        return None
    return Verdict("False", "NoneReady", f"none of the {facts.it.name} {facts.it.noun} is ready")


def _runtime_unsupported(facts: ComponentFacts) -> Verdict | None:
    why = facts.it.unsupported
    if not why:
        return None
    return Verdict("Unknown", "RuntimeUnsupported", f"whether requests reach it is unknown: {why}")


def _no_picker(facts: ComponentFacts) -> Verdict | None:
    pickers = list(facts.graph.of_kind(*PICKERS))
    if facts.it.plan.kind in PICKERS or not pickers or any(picker.ready for picker in pickers):
        return None
    which = ", ".join(picker.name for picker in pickers)
    return Verdict("False", "NoPickerReady", f"no pod of {which} is ready to send it requests")


# --- ScalingActive


def scaling(facts: ComponentFacts) -> Verdict | None:
    """Who rules over the replicas; None while it is simply the graph.

    That an adapter's number is another than the graph's is what it is there for. It is told where
    the author changed the graph's number all the same, for as long as the numbers differ.
    """
    plan = facts.it.plan
    if plan.scaled_by == "graph":
        return None
    field = f"spec.components[{plan.name}].replicas"
    if plan.scaled_by == "kept":
        message = f"the scaling adapter is gone; {plan.replicas} stay until {field} changes"
        return Verdict("False", "AdapterRemoved", message)
    if plan.scaled_by == "outlived":
        message = (
            f"the workload that an autoscaler scaled to {plan.replicas} is gone; they stay until"
            f" {field} changes; point the autoscaler at a scaling adapter"
        )
        return Verdict("False", "AutoscalerOutlived", message)
    if plan.scaled_by != "adapter":
        message = f"{plan.scaled_by} on {plan.workload_kind}/{plan.workload} rules"
        return Verdict("True", "ScaledByAutoscaler", f"{message} with {plan.replicas}")
    adapter = f"dgdsa/{names.adapter_name(facts.graph.observed.name, plan.name)}"
    rules = f"the scaling adapter {adapter} rules with {plan.replicas}"
    if plan.ignored_replicas is None or not (plan.renumbered or _was_ignored(facts)):
        return Verdict("True", "ScaledByAdapter", rules)
    message = f"{field} is {plan.ignored_replicas}, {rules}; change it with kubectl scale {adapter}"
    return Verdict("True", GRAPH_REPLICAS_IGNORED, message)


def _was_ignored(facts: ComponentFacts) -> bool:
    before = at(facts.graph.observed.status, "components", facts.it.name)
    return any(
        text(condition, "reason") == GRAPH_REPLICAS_IGNORED
        for condition in items(before, "conditions")
    )


# --- what keeps it from Ready


def unready(facts: ComponentFacts) -> Verdict | None:
    """Why the component is not what the graph's current generation wants; None if it is.

    None means: its workload is the wanted one, its controller has seen that, all replicas are
    available and run the current template, no others run, and requests reach it.
    """
    return chain(
        facts,
        _not_rendered,
        _refused,
        _absent,
        _unseen,
        _failing,
        stalled,
        _rolling,
        _waiting,
        _unroutable,
    )


def _no(reason: str, message: str) -> Verdict:
    return Verdict("False", reason, message)


def _not_rendered(facts: ComponentFacts) -> Verdict | None:
    if facts.it.rendered:
        return None
    why = sentences(note.message for note in facts.it.notes) or "nothing runs for it"
    return _no(SOME_NOT_READY, f"{facts.it.name}: {why}")


def _refused(facts: ComponentFacts) -> Verdict | None:
    if not facts.it.refused:
        return None
    refusal = facts.it.refused[0]
    again = "; tried again" if refusal.transient else ""
    return _no(
        UPDATING if refusal.transient else SOME_NOT_READY,
        f"{facts.it.name}: {refusal_text(refusal)}{again}",
    )


def refusal_text(refusal: Refused) -> str:
    """`Deployment/g-worker is refused: …`."""
    return f"{refusal.object} is refused: {refusal.message}"


def _missing(facts: ComponentFacts) -> str:
    plan = facts.it.plan
    return f"{plan.name}: {plan.workload_kind} {plan.workload} does not exist yet"


def _absent(facts: ComponentFacts) -> Verdict | None:
    if facts.it.current is not None:
        return None
    return _no(UPDATING if facts.it.old else PODS_NOT_READY, _missing(facts))


def _unseen(facts: ComponentFacts) -> Verdict | None:
    if facts.it.seen:
        return None
    workload = f"{facts.it.plan.workload_kind} {facts.it.plan.workload}"
    return _no(UPDATING, f"{facts.it.name}: {workload} is being updated")


def _failing(facts: ComponentFacts) -> Verdict | None:
    group = next(facts.it.faults, None)
    if group is None:
        return None
    cluster = group.trouble.fault == "cluster"
    return _no(NO_CAPACITY if cluster else PODS_NOT_READY, str(group))


def stalled(facts: ComponentFacts) -> Verdict | None:
    """Says so if nothing has come up within the workload's deadline."""
    if not facts.it.stalled:
        return None
    why = sentences(map(str, facts.it.groups)) or facts.it.stalled
    return _no(PODS_NOT_READY, f"{facts.it.name}: no progress within its deadline: {why}")


def _rolling(facts: ComponentFacts) -> Verdict | None:
    return _no(UPDATING, progress(facts)) if facts.it.rolling else None


def _waiting(facts: ComponentFacts) -> Verdict | None:
    it = facts.it
    if it.settled:
        return None
    group = next(iter(it.groups), None)
    message = f"{it.name}: {it.available} of {it.plan.replicas} {it.noun} are available"
    if group is not None:
        message = str(group)
    if it.unsupported:  # the likely cause: nobody knows how to tell whether it is ready
        message = f"{message}; {it.name}: {it.unsupported}"
    return _no(PODS_NOT_READY, message)


def _unroutable(facts: ComponentFacts) -> Verdict | None:
    found = routable(facts)
    if found is None or found.status == "True" or not facts.it.plan.replicas:
        return None
    return _no(SOME_NOT_READY, f"{facts.it.name}: {found.message}")


def progress(facts: ComponentFacts) -> str:
    """`worker: 1 of 3 pods run the current template`."""
    it = facts.it
    return f"{it.name}: {it.updated} of {it.plan.replicas} {it.noun} run the current template"
