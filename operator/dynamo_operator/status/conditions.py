"""The conditions of a graph as a whole.

Ready: everything of the current generation runs and requests reach it. Progressing: something is
under way that ends by itself, or once the cluster has what its message names. Degraded: something
is wrong that somebody should look at. The others (`RolledBack`, `RuntimeUnsupported`,
`NotRendered`, `Adapted`) appear when there is reason to, and stay as False from then on.
"""

from collections.abc import Callable, Iterable, Iterator

from dynamo_operator.diagnosis.fields import at, condition, count
from dynamo_operator.diagnosis.wording import sentences
from dynamo_operator.render.notes import RUNTIME_UNSUPPORTED, Note
from dynamo_operator.status.components import (
    ALL_READY,
    MIXED,
    SOME_NOT_READY,
    UPDATING,
    progress,
    refusal_text,
    stalled,
    unready,
)
from dynamo_operator.status.facts import Component, ComponentFacts, GraphFacts
from dynamo_operator.status.verdict import Verdict, chain

WRITE_REFUSED = "WriteRefused"
ROLLED_BACK = "RolledBack"
STALLED = "ProgressDeadlineExceeded"
SCALING = "Scaling"

_SERVED_BY_OPERATOR = frozenset({"RestartNotRendered"})
"""Notes of rendering about what no manifest shows, and the operator does."""


def _each(facts: GraphFacts) -> Iterator[ComponentFacts]:
    return (ComponentFacts(facts, component) for component in facts.components)


# --- Ready


def ready(facts: GraphFacts) -> Verdict:
    """Whether every component runs the graph's current generation and is routable."""
    found = chain(facts, _graph_refused, _empty, _went_back, _components_unready, _leaving)
    if found is not None:
        return found
    zero = [c.name for c in facts.components if not c.plan.replicas]
    message = f"all {len(facts.components)} components run what the graph wants"
    if zero:
        message += f"; scaled to zero: {', '.join(zero)}"
    return Verdict("True", ALL_READY, message)


def _empty(facts: GraphFacts) -> Verdict | None:
    if facts.components:
        return None
    return Verdict("False", SOME_NOT_READY, "the graph has no components")


def _went_back(facts: GraphFacts) -> Verdict | None:
    rollback = facts.plan.rollback
    if rollback is None:
        return None
    message = (
        f"the workers run the last template that worked ({rollback.good_hash}), because the new"
        f" one ({rollback.failed_hash}) failed: {rollback.message}; change the graph to try again"
    )
    return Verdict("False", SOME_NOT_READY, message)


def _graph_refused(facts: GraphFacts) -> Verdict | None:
    """Refusals about nobody in particular; those of components are told with them."""
    names = {component.name for component in facts.components}
    for refusal in facts.refused:
        if refusal.component not in names:
            return Verdict("False", SOME_NOT_READY, refusal_text(refusal))
    return None


def _components_unready(facts: GraphFacts) -> Verdict | None:
    found = [verdict for item in _each(facts) if (verdict := unready(item)) is not None]
    if not found:
        return None
    failing = {str(group) for component in facts.components for group in component.faults}
    found.sort(key=lambda verdict: verdict.message not in failing)
    reasons = {verdict.reason for verdict in found}
    reason = found[0].reason if len(reasons) == 1 else MIXED
    return Verdict("False", reason, sentences(verdict.message for verdict in found))


def _leaving(facts: GraphFacts) -> Verdict | None:
    if not facts.leaving:
        return None
    return Verdict("False", UPDATING, f"{', '.join(facts.leaving)} of before still runs")


# --- Progressing


def progressing(facts: GraphFacts) -> Verdict:
    """Whether something is under way that ends without the author."""
    found = chain(
        facts, _unreadable, _stuck, _restarts, _rolls_out, _comes_up, _winds_down, _stays_back
    )
    return found or Verdict("False", "Complete", "nothing is under way")


def _unreadable(facts: GraphFacts) -> Verdict | None:
    """Nothing is wanted, because what the graph says can't be read: all stays as it is."""
    if facts.components or not facts.refused:
        return None
    return Verdict("False", WRITE_REFUSED, refusal_text(facts.refused[0]))


def _stuck(facts: GraphFacts) -> Verdict | None:
    stuck = [item for item in _each(facts) if item.it.stalled]
    if not stuck:
        return None
    message = sentences(
        f"{progress(item)}, and no more have come up within the deadline" for item in stuck
    )
    return Verdict("False", STALLED, message)


def _restarts(facts: GraphFacts) -> Verdict | None:
    restart = facts.plan.restart
    if restart is None or not restart.in_progress:
        return None
    message = f"restart {restart.id}: {', '.join(restart.in_progress)}"
    return Verdict("True", "Restarting", message)


def _rolls_out(facts: GraphFacts) -> Verdict | None:
    rolling = [progress(item) for item in _each(facts) if item.it.rolling]
    return Verdict("True", "RollingOut", sentences(rolling)) if rolling else None


def _comes_up(facts: GraphFacts) -> Verdict | None:
    """Replicas that are created, started or given up, all of one template. What fails for good
    does not end by itself; what waits for the cluster does, once that has what is named."""
    waiting = [it for it in facts.components if it.rendered and not it.settled]
    if not waiting:
        return None
    faults = sorted((f for it in waiting for f in it.faults), key=lambda fault: fault.trouble.rank)
    message = sentences(
        (
            *(
                f"{it.name}: {it.available} of {it.plan.replicas} {it.noun} are available"
                for it in waiting
            ),
            *map(str, faults),
        )
    )
    lasting = next((fault.trouble.reason for fault in faults if fault.trouble.lasting), "")
    if lasting:
        return Verdict("False", lasting, message)
    return Verdict("True", SCALING if _resized(facts, waiting) else "Starting", message)


def _resized(facts: GraphFacts, waiting: Iterable[Component]) -> bool:
    """Whether what is waited for are other numbers than those with which the graph was Ready. Pods
    that were lost are replaced under the same number. Once that is said it stays until Ready."""
    before = condition(facts.observed.raw, "Progressing")
    if condition(facts.observed.raw, "Ready").get("status") != "True":
        return (before.get("status"), before.get("reason")) == ("True", SCALING)
    numbers = at(facts.observed.status, "components")
    return all(
        it.plan.replicas != count(numbers, it.name, "replicas", default=it.plan.replicas)
        for it in waiting
    )


def _winds_down(facts: GraphFacts) -> Verdict | None:
    found = _leaving(facts)
    return Verdict("True", "RollingOut", found.message) if found else None


def _stays_back(facts: GraphFacts) -> Verdict | None:
    back = _went_back(facts)
    return Verdict("False", ROLLED_BACK, back.message) if back else None


# --- Degraded


def degraded(facts: GraphFacts) -> Verdict:
    """Whether something is wrong that somebody should look at."""
    found = chain(
        facts,
        _writes_refused,
        rolled_back,
        _pods_fail,
        _no_progress,
        _left_out,
        runtime_unsupported,
    )
    return found or Verdict("False", "AsExpected", "nothing is wrong")


def _writes_refused(facts: GraphFacts) -> Verdict | None:
    if not facts.refused:
        return None
    return Verdict("True", WRITE_REFUSED, sentences(map(refusal_text, facts.refused)))


def _pods_fail(facts: GraphFacts) -> Verdict | None:
    groups = [group for component in facts.components for group in component.faults]
    if not groups:
        return None
    groups.sort(key=lambda group: group.trouble.rank)
    return Verdict("True", groups[0].trouble.reason, sentences(map(str, groups)))


def _no_progress(facts: GraphFacts) -> Verdict | None:
    stuck = [verdict.message for item in _each(facts) if (verdict := stalled(item))]
    return Verdict("True", STALLED, sentences(stuck)) if stuck else None


def _left_out(facts: GraphFacts) -> Verdict | None:
    missing = [component for component in facts.components if not component.rendered]
    notes = [note for component in missing for note in component.notes if note.is_omission]
    if not missing:
        return None
    names = ", ".join(component.name for component in missing)
    reason = notes[0].reason if notes else "NotRendered"
    why = sentences(note.message for note in notes) or "nothing runs for it"
    return Verdict("True", reason, f"{names}: {why}")


# --- what else there is to say


def rolled_back(facts: GraphFacts) -> Verdict | None:
    """Whether the workers run an earlier template because the wanted one failed."""
    back = _went_back(facts)
    return Verdict("True", ROLLED_BACK, back.message) if back else None


def runtime_unsupported(facts: GraphFacts) -> Verdict | None:
    """Whether a component runs something that nothing here knows."""
    return _noted(facts, RUNTIME_UNSUPPORTED, lambda note: note.reason == RUNTIME_UNSUPPORTED)


def not_rendered(facts: GraphFacts) -> Verdict | None:
    """Whether something that the graph asks for is not there."""
    return _noted(facts, "FieldsNotRendered", lambda note: note.is_omission)


def adapted(facts: GraphFacts) -> Verdict | None:
    """Whether something runs in another way than it was written."""

    def other(note: Note) -> bool:
        return note.reason != RUNTIME_UNSUPPORTED and not note.is_omission

    return _noted(facts, "GraphAdapted", other)


def _noted(facts: GraphFacts, several: str, which: Callable[[Note], bool]) -> Verdict | None:
    """True with the notes' own reason and text; `several` where their reasons differ."""
    found = [
        note for note in facts.plan.notes if which(note) and note.reason not in _SERVED_BY_OPERATOR
    ]
    if not found:
        return None
    reasons = {note.reason for note in found}
    reason = found[0].reason if len(reasons) == 1 else several
    return Verdict("True", reason, sentences(_texts(found, with_reason=len(reasons) > 1)))


def _texts(notes: Iterable[Note], with_reason: bool) -> Iterator[str]:
    for note in notes:
        said = f"{note.reason}: {note.message}" if with_reason else note.message
        yield f"{note.component}: {said}" if note.component else said


GRAPH: dict[str, Callable[[GraphFacts], Verdict]] = {
    "Ready": ready,
    "Progressing": progressing,
    "Degraded": degraded,
}
"""Conditions that every graph has."""

AT_TIMES: dict[str, tuple[Callable[[GraphFacts], Verdict | None], Verdict]] = {
    "RolledBack": (rolled_back, Verdict("False", "NotRolledBack", "the wanted template runs")),
    "RuntimeUnsupported": (
        runtime_unsupported,
        Verdict("False", "RuntimeSupported", "every component runs something known"),
    ),
    "NotRendered": (
        not_rendered,
        Verdict("False", "AllRendered", "everything that the graph asks for is there"),
    ),
    "Adapted": (adapted, Verdict("False", "AsWritten", "everything runs as it was written")),
}
"""Conditions that appear once they are true, with what they say when they are no more."""
