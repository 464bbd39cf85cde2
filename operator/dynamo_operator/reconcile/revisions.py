"""Revisions: what a graph was rendered to, kept in ControllerRevisions.

Two promises need a memory that outlives the operator. A newer operator, whose rendering differs,
restarts no pod: as long as the author changes nothing that can show in a component's pods, its
template of the revision is applied again. Workers are one in this: they share the worker hash. And
a rollout whose new containers fail can go back to the last templates that worked.

A revision's data never changes (the API server sees to that); its number says which one is current,
its annotation whether it ever worked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from dynamo_crds.v1beta1 import GraphSpec
from pydantic import ValidationError

from dynamo_operator.diagnosis.fields import label
from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.render import Rendered, names, template_inputs, whole_inputs
from dynamo_operator.render.canonical import short_hash
from dynamo_operator.render.pairing import secrets_read

STATE_ANNOTATION = "nvidia.com/dynamo-revision-state"
REASON_ANNOTATION = "nvidia.com/dynamo-revision-reason"
GOOD = "good"
FAILED = "failed"
KEPT_BESIDE = 3
"""Revisions that are kept beside the current one and the last good one."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One rendering of a graph."""

    name: str
    number: int
    """Rises each time that a revision becomes the current one."""
    inputs: Mapping[str, str]
    """Component -> hash of all that its author says about its pods (`render.template_inputs`)."""
    worker_hash: str
    workers: tuple[str, ...]
    """Names of the components that are workers."""
    templates: Mapping[str, Mapping[str, Json]]
    """Component -> its pod templates, as in `render.Kept`."""
    spec: Json
    """The graph's spec that it was rendered from."""
    groups_apart: bool = True
    """As in `render.Kept`; not on record means that they were not."""
    state: str = ""
    """`GOOD` once all of it ran and was routable, `FAILED` if its containers failed, else ""."""
    reason: str = ""
    """Why it failed."""
    whole: str = ""
    """What an older operator recorded as its inputs (`render.whole_inputs`); "" for later ones."""

    def manifest(self, observed: Observed) -> Json:
        """The ControllerRevision."""
        annotations = {STATE_ANNOTATION: self.state} if self.state else {}
        if self.reason:
            annotations[REASON_ANNOTATION] = self.reason
        metadata: Json = {
            "name": self.name,
            "namespace": observed.namespace,
            "labels": {
                names.GRAPH_LABEL: names.bounded(observed.name),
                names.MANAGED_BY_LABEL: names.MANAGED_BY,
            },
        }
        if annotations:
            metadata["annotations"] = annotations
        data: Json = {
            "inputs": self.whole or dict(self.inputs),
            "workerHash": self.worker_hash,
            "workers": list(self.workers),
            "templates": dict(self.templates),
            "spec": self.spec,
        }
        if self.groups_apart:
            data["groupsApart"] = True
        return {
            "apiVersion": "apps/v1",
            "kind": "ControllerRevision",
            "metadata": metadata,
            "revision": self.number,
            "data": data,
        }


def packed(data: Any) -> bytes:
    """A revision's data as caches keep it: there are several for each graph, with everything in
    them twice, and they are read far less often than they are held."""
    return zlib.compress(msgspec.json.encode(data), 1)


def unpacked(data: Any) -> Any:
    """What `packed` packed; anything else as it is."""
    return msgspec.json.decode(zlib.decompress(data)) if isinstance(data, bytes) else data


def made(observed: Observed, fresh: Rendered) -> Revision:
    """The revision in which all is as it is rendered now; without a number yet."""
    running = {
        component.name: component.role for component in fresh.components if component.templates
    }
    inputs = template_inputs(observed.graph.spec, observed.annotations, running)
    templates = {component.name: component.templates for component in fresh.components}
    return Revision(
        name=_name(observed, inputs, templates),
        number=0,
        inputs=inputs,
        worker_hash=fresh.worker_hash,
        workers=tuple(item.name for item in fresh.components if item.kind == "worker"),
        templates=templates,
        spec=observed.raw.get("spec") or {},
    )


def _name(
    observed: Observed, inputs: Mapping[str, str], templates: Mapping[str, Mapping[str, Json]]
) -> str:
    """A revision's name: its content."""
    return names.bounded(f"{observed.name}-{short_hash([inputs, templates])}", 253)


def read(observed: Observed) -> list[Revision]:
    """The graph's revisions, oldest first; those that can't be understood are left out."""
    found = []
    for child in observed.of_kind("ControllerRevision"):
        try:
            data: Any = unpacked(child.get("data"))
            annotations = child["metadata"].get("annotations") or {}
            whole = data["inputs"] if isinstance(data["inputs"], str) else ""
            templates = dict(data["templates"])
            spec = dict(data["spec"])
            found.append(
                Revision(
                    name=child["metadata"]["name"],
                    number=int(child.get("revision", 0)),
                    inputs=_told_apart(observed, whole, spec, templates)
                    if whole
                    else dict(data["inputs"]),
                    worker_hash=str(data["workerHash"]),
                    workers=tuple(data["workers"]),
                    templates=templates,
                    spec=spec,
                    groups_apart=bool(data.get("groupsApart", False)),
                    state=str(annotations.get(STATE_ANNOTATION, "")),
                    reason=str(annotations.get(REASON_ANNOTATION, "")),
                    whole=whole,
                )
            )
        except (KeyError, TypeError, ValueError, zlib.error):
            continue
    return sorted(found, key=lambda revision: (revision.number, revision.name))


def pairing_secret(found: list[Revision], graph: str) -> str:
    """The Secret that prefill and decode workers of the graph have in its newest revision that has
    any, "" for none: what is rendered afresh beside kept templates has to share it."""
    for revision in reversed(found):
        for templates in revision.templates.values():
            for name in secrets_read(templates, graph):
                return name
    return ""


def _told_apart(
    observed: Observed, whole: str, spec: Json, templates: Mapping[str, Mapping[str, Json]]
) -> Mapping[str, str]:
    """The inputs of each component, where only the hash of all is on record: from the spec that it
    was made from. Nothing if the graph's annotations, which are not on record, were others."""
    try:
        earlier = GraphSpec.model_validate(spec)
    except ValidationError:
        return {}
    if whole_inputs(earlier, observed.annotations) != whole:
        return {}
    roles = {
        name: role
        for name, parts in templates.items()
        for template in parts.values()
        if (role := label(template, names.TYPE_LABEL))
    }
    return template_inputs(earlier, observed.annotations, roles)


def current(observed: Observed, found: list[Revision], fresh: Revision) -> Revision:
    """The revision to run: of each component the templates of the newest known revision with the
    same inputs, whatever operator rendered it, else those of `fresh`. It gets the highest number;
    one that comes back is tried anew."""
    newest = found[-1] if found else None
    number = newest.number if newest is not None else 0
    wanted, workers_of = _with_known_templates(observed, found, fresh)
    for revision in reversed(found):
        if revision.inputs == wanted.inputs and revision.templates == wanted.templates:
            if revision.number == number:
                return revision
            state = GOOD if revision.state == GOOD else ""
            return replace(revision, number=number + 1, state=state, reason="")
    if newest is not None and workers_of is newest and newest.state == FAILED:
        # Another component has changed; that is no other chance for the workers.
        return replace(wanted, number=number + 1, state=FAILED, reason=newest.reason)
    return replace(wanted, number=number + 1)


def _with_known_templates(
    observed: Observed, found: list[Revision], fresh: Revision
) -> tuple[Revision, Revision | None]:
    """`fresh` with the templates of known revisions where the inputs are the same; and the revision
    that its workers are of, if they are kept. They share a hash: all are kept, or none."""

    newest_first = found[::-1]
    templates = dict(fresh.templates)
    for name in templates.keys() - set(fresh.workers):
        earlier = next((r for r in newest_first if _agree(r, fresh, [name])), None)
        if earlier is not None:
            templates[name] = earlier.templates[name]
    same = (r for r in newest_first if set(r.workers) == set(fresh.workers))
    workers = next((r for r in same if _agree(r, fresh, fresh.workers)), None)
    if workers is not None:
        templates |= {name: workers.templates[name] for name in fresh.workers}
        fresh = replace(fresh, worker_hash=workers.worker_hash, groups_apart=workers.groups_apart)
    name = _name(observed, fresh.inputs, templates)
    return replace(fresh, name=name, templates=templates), workers


def _agree(revision: Revision, fresh: Revision, components: Iterable[str]) -> bool:
    """Whether the author said the same of these components, and they have the same kinds of
    templates: one that could not run then may do so now."""
    return all(
        revision.inputs.get(name) == fresh.inputs[name]
        and revision.templates.get(name, {}).keys() == fresh.templates[name].keys()
        for name in components
    )


def last_good(found: list[Revision], than: Revision) -> Revision | None:
    """The newest revision that worked, other than `than`, with other workers."""
    for revision in reversed(found):
        if (
            revision.state == GOOD
            and revision.name != than.name
            and revision.worker_hash != than.worker_hash
        ):
            return revision
    return None


def superfluous(found: list[Revision], keep: Iterable[Revision | None]) -> list[str]:
    """Names of the revisions that nothing needs any more."""
    needed = {revision.name for revision in keep if revision is not None}
    beside = [revision.name for revision in found if revision.name not in needed]
    return beside[:-KEPT_BESIDE]
