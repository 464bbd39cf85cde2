"""What is let in: the verdict on one request, from the request alone.

Objects of either version are checked as their author wrote them and, once they are in order,
looked at in v1beta1's form. What was accepted before is never refused later for the same mistake:
an update is denied only for what is wrong now and was not wrong already, so that a stricter release
locks nobody out of an existing graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dynamo_crds.conversion import convert
from dynamo_crds.load import KINDS
from dynamo_crds.problem import Finding, findings, show_path, show_value
from dynamo_crds.schema import Resource
from dynamo_crds.v1beta1 import API_VERSION, DynamoGraphDeployment
from pydantic import ValidationError

from dynamo_operator.admission import advice, changes, trial
from dynamo_operator.admission.review import CREATE, UPDATE, Denial, Json, Request
from dynamo_operator.admission.trial import Trial
from dynamo_operator.admission.wording import Wording
from dynamo_operator.render import Platform, Rendered, render_with_notes
from dynamo_operator.render.overrides import Scale

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_READ_OF_METADATA = ("name", "generateName", "namespace", "labels", "annotations")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Denied if there are denials; else let in, provided that the trials go well."""

    denials: tuple[Denial, ...] = ()
    warnings: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    """Objects to ask the API server about."""


def judge(request: Request, platform: Platform) -> Verdict:
    """The verdict on a request. Pure; `platform` is what graphs are rendered for."""
    after, before = request.object, request.old if request.operation == UPDATE else None
    model = KINDS.get((str((after or {}).get("apiVersion")), request.kind))
    if after is None or model is None or request.operation not in (CREATE, UPDATE):
        return Verdict()
    if _being_deleted(after) or (before is not None and _said(before) == _said(after)):
        return Verdict()
    known = set() if before is None else {_key(f) for f in findings(model, _checked(before))}
    mistakes = [f for f in findings(model, _checked(after)) if _key(f) not in known]
    if mistakes:
        return Verdict(tuple(_denial(finding) for finding in sorted(mistakes, key=_place)))
    if request.kind != DynamoGraphDeployment.__name__:
        return Verdict()
    return _judge_graph(after, before, model, request.namespace, platform)


def _judge_graph(
    after: Json, before: Json | None, model: type[Resource], namespace: str, platform: Platform
) -> Verdict:
    wording = Wording(str(after["apiVersion"]))
    new = _as_stored(after)
    old = None if before is None else _as_stored(before)
    if old is not None:
        forbidden = tuple(changes.forbidden_changes(old, new, wording))
        if forbidden:
            return Verdict(forbidden)
    graph = _graph(new, namespace)
    if graph is None:  # a mistake of old that the update leaves as it was
        return Verdict()
    earlier = None if old is None else _graph(old, namespace)
    rendered = _rendered(graph, platform)
    rendered_before = None if earlier is None else _rendered(earlier, platform)
    tried = trial.trials(graph, rendered, rendered_before)
    twice = tuple(denial for one in tried for denial in trial.doubled(one, wording))
    if twice:
        return Verdict(twice)
    written = model.lenient(_checked(after))
    written_before = None if before is None else model.lenient(_checked(before))
    warnings = advice.new_deprecations(written, written_before)
    if not graph.spec.components:
        warnings.append("the graph has no components: nothing will run")
    if earlier is not None:
        warnings += advice.overruled_replicas(earlier, graph, wording)
    warnings += advice.odd_rollback(graph, earlier)
    warnings += advice.new_notes(rendered, rendered_before, wording)
    return Verdict(warnings=tuple(warnings), trials=tried)


def _rendered(graph: DynamoGraphDeployment, platform: Platform) -> Rendered:
    unscaled = {component.name: Scale(None) for component in graph.spec.components}
    return render_with_notes(graph, platform, scale=unscaled)


def _being_deleted(manifest: Json) -> bool:
    return (manifest.get("metadata") or {}).get("deletionTimestamp") is not None


def _said(manifest: Json) -> Any:
    """What people say in an object that anything here depends on."""
    annotations = (manifest.get("metadata") or {}).get("annotations") or {}
    return manifest.get("spec"), {k: v for k, v in annotations.items() if k != LAST_APPLIED}


def _checked(manifest: Json) -> Json:
    """The part of an object that its author answers for."""
    metadata = manifest.get("metadata") or {}
    kept = {key: metadata[key] for key in _READ_OF_METADATA if key in metadata}
    return {**{k: v for k, v in manifest.items() if k != "status"}, "metadata": kept}


def _as_stored(manifest: Json) -> Json:
    return convert(_checked(manifest), API_VERSION)


def _graph(manifest: Json, namespace: str) -> DynamoGraphDeployment | None:
    metadata = {"namespace": namespace, **manifest["metadata"]}
    try:
        return DynamoGraphDeployment.model_validate({**manifest, "metadata": metadata})
    except ValidationError:
        return None


def _key(finding: Finding) -> tuple[Any, ...]:
    return finding.path, finding.message, show_value(finding.value)


def _place(finding: Finding) -> list[tuple[bool, str | int]]:
    """Sorts by place in the manifest; list items by number."""
    return [(isinstance(step, str), step) for step in finding.path]


def _denial(finding: Finding) -> Denial:
    found = "nothing" if finding.value is None else show_value(finding.value)
    expected = f": found {found}, expected {finding.expected}" if finding.expected else ""
    return Denial(show_path(finding.path), finding.message + expected, "invalid")


def denied_by(denials: tuple[Denial, ...]) -> Iterator[str]:
    """The reasons of a denial, each once, for metrics."""
    yield from dict.fromkeys(denial.reason for denial in denials)
