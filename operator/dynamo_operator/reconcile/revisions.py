"""Revisions: what a graph was rendered to, kept in ControllerRevisions.

Two promises need a memory that outlives the operator. A newer operator, whose rendering differs,
restarts no pod: as long as the author changes nothing that can show in a pod, the templates of the
revision are applied again. And a rollout whose new containers fail can go back to the last
templates that worked.

A revision's data never changes (the API server sees to that); its number says which one is current,
its annotation whether it ever worked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from dynamo_operator.reconcile.observed import Json, Observed
from dynamo_operator.render import names
from dynamo_operator.render.canonical import short_hash

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
    inputs: str
    """Hash of all of the graph that can show in a pod (`render.template_inputs`)."""
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
            "inputs": self.inputs,
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


def made(
    observed: Observed,
    inputs: str,
    worker_hash: str,
    workers: Iterable[str],
    templates: Mapping[str, Mapping[str, Json]],
) -> Revision:
    """A new revision, named by its content; without a number yet."""
    name = f"{observed.name}-{short_hash([inputs, templates])}"
    spec = observed.raw.get("spec") or {}
    return Revision(
        names.bounded(name, 253), 0, inputs, worker_hash, tuple(workers), templates, spec
    )


def read(observed: Observed) -> list[Revision]:
    """The graph's revisions, oldest first; those that can't be understood are left out."""
    found = []
    for child in observed.of_kind("ControllerRevision"):
        try:
            data: Any = unpacked(child.get("data"))
            annotations = child["metadata"].get("annotations") or {}
            found.append(
                Revision(
                    name=child["metadata"]["name"],
                    number=int(child.get("revision", 0)),
                    inputs=str(data["inputs"]),
                    worker_hash=str(data["workerHash"]),
                    workers=tuple(data["workers"]),
                    templates=dict(data["templates"]),
                    spec=dict(data["spec"]),
                    groups_apart=bool(data.get("groupsApart", False)),
                    state=str(annotations.get(STATE_ANNOTATION, "")),
                    reason=str(annotations.get(REASON_ANNOTATION, "")),
                )
            )
        except (KeyError, TypeError, ValueError, zlib.error):
            continue
    return sorted(found, key=lambda revision: (revision.number, revision.name))


def current(found: list[Revision], fresh: Revision) -> Revision:
    """The revision to run: a known one of the same inputs, whatever operator rendered it, else
    `fresh`. It gets the highest number; one that comes back is tried anew."""
    newest = found[-1].number if found else 0
    for revision in reversed(found):
        if revision.inputs == fresh.inputs and _shape(revision) == _shape(fresh):
            if revision.number == newest:
                return revision
            state = GOOD if revision.state == GOOD else ""
            return replace(revision, number=newest + 1, state=state, reason="")
    return replace(fresh, number=newest + 1)


def _shape(revision: Revision) -> dict[str, frozenset[str]]:
    """Which templates there are: a component that could not run then may do so now."""
    return {name: frozenset(templates) for name, templates in revision.templates.items()}


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
