"""What people should know of a graph that is let in: warnings, which kubectl shows at once.

On an update only what the update brought is said, so that nobody reads the same line twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from dynamo_crds.schema import Resource
from dynamo_crds.v1beta1 import Component, DynamoGraphDeployment
from dynamo_crds.validate import deprecations

from dynamo_operator.admission.wording import Wording
from dynamo_operator.render import Note, Rendered, names, notes

ROUTINE = frozenset(
    {
        notes.RUNTIME_MAPPED,
        notes.FLAGS_TRANSLATED,
        notes.TYPE_INFERRED,
        notes.IMAGE_DEFAULTED,
    }
)
"""Notes on what rendering does with every manifest written for Dynamo: they come last."""


def new_notes(rendered: Rendered, before: Rendered | None, wording: Wording) -> list[str]:
    """What rendering has to say of a graph and had not to say of its former state."""
    known = set() if before is None else set(before.notes)
    fresh = [note for note in rendered.notes if note not in known]
    return [_line(note, wording) for note in sorted(fresh, key=lambda n: n.reason in ROUTINE)]


def new_deprecations(written: Resource, before: Resource | None) -> list[str]:
    """Deprecated fields; both states in their author's version."""
    said = set() if before is None else set(deprecations(before))
    return [line for line in deprecations(written) if line not in said]


def _line(note: Note, wording: Wording) -> str:
    where = f"{wording.noun(note.component)}: " if note.component else ""
    return f"{where}{note.reason}: {note.message}"


def overruled_replicas(
    before: DynamoGraphDeployment, after: DynamoGraphDeployment, wording: Wording
) -> Iterator[str]:
    """Changes of replicas that have no effect, because a scaling adapter rules."""
    known = {component.name: component for component in before.spec.components}
    for index, component in enumerate(after.spec.components):
        old = known.get(component.name)
        if old is None or old.replicas == component.replicas or not _ruled(old, component):
            continue
        field = wording.component(index, component.name, "replicas")
        adapter = names.adapter_name(after.metadata.name or "", component.name)
        wanted = 1 if component.replicas is None else component.replicas
        yield (
            f"{field} is ignored while the scaling adapter {adapter} rules: "
            f"kubectl scale dgdsa/{adapter} --replicas={wanted}"
        )


def odd_rollback(
    graph: DynamoGraphDeployment, before: DynamoGraphDeployment | None
) -> Iterator[str]:
    """A wish to go back by itself that is worded so that nobody hears it."""
    wish = _rollback(graph)
    if wish.lower() not in ("", "true", "false") and (before is None or _rollback(before) != wish):
        yield (
            f"metadata.annotations[{names.ROLLBACK_ANNOTATION}]: {wish!r} switches nothing on; "
            '"true" does'
        )


def _rollback(graph: DynamoGraphDeployment) -> str:
    return (graph.metadata.annotations or {}).get(names.ROLLBACK_ANNOTATION, "")


def _ruled(before: Component, after: Component) -> bool:
    return before.scaling_adapter is not None and after.scaling_adapter is not None
