"""What `dynamo validate` finds in manifests: problems, and notes on what is accepted but unused.

Pure: text in, report out. Files, directories and standard input belong to the command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dynamo_crds import v1alpha1, v1beta1
from dynamo_crds.conversion import to_v1beta1
from dynamo_crds.load import KINDS, Document, check, parse, read_documents
from dynamo_crds.pod import MAIN
from dynamo_crds.problem import Problem
from dynamo_crds.schema import Resource

_DNS_LABEL = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")


@dataclass(slots=True)
class Report:
    """What was found in one file.

    `checked` names the objects that are ours and in order; `notes` are no mistakes.
    """

    file: str
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def validate_text(text: str, file: str) -> Report:
    """Checks every document of a manifest; all problems of the file are reported at once."""
    report = Report(file)
    documents, report.problems = read_documents(text, file)
    for document in documents:
        problems = check(document)
        report.problems.extend(problems)
        if problems:
            continue
        label = f"{document.kind} {document.name or '(no name)'}"
        if (document.api_version, document.kind) not in KINDS:
            what = f"kind {document.kind} ({document.api_version}) {document.name}".rstrip()
            report.notes.append(f"not checked: {what}")
            continue
        report.checked.append(label)
        report.notes.extend(f"{label}: {note}" for note in notes(parse(document)))
    if not documents and not report.problems:
        report.problems.append(_empty(file))
    _report_duplicates(documents, report)
    return report


def _empty(file: str) -> Problem:
    expected = f"an object such as a {next(iter(v1beta1.KINDS))}"
    return Problem(file, 0, "", None, expected, "the file holds no object")


def _report_duplicates(documents: list[Document], report: Report) -> None:
    seen: dict[tuple[str, str, str], int] = {}
    for document in documents:
        if (document.api_version, document.kind) not in KINDS or not document.name:
            continue
        metadata: dict[str, Any] = document.data["metadata"]
        identity = (document.kind, str(metadata.get("namespace", "")), document.name)
        first = seen.setdefault(identity, document.index)
        if first != document.index:
            line = document.line(("metadata", "name"))
            expected = "another name, because a later object replaces an earlier one"
            message = f"document {first + 1} holds a {document.kind} of that name"
            report.problems.append(
                Problem(
                    report.file,
                    document.index,
                    "metadata.name",
                    document.name,
                    expected,
                    message,
                    line,
                )
            )


def notes(resource: Resource) -> Iterator[str]:
    """What is accepted but has no effect, or not the one that its author may expect."""
    yield from deprecations(resource)
    if isinstance(resource, v1alpha1.DynamoGraphDeployment):
        yield from _graph_notes(to_v1beta1(resource))
    elif isinstance(resource, v1beta1.DynamoGraphDeployment):
        yield from _graph_notes(resource)


def deprecations(resource: Resource) -> Iterator[str]:
    """Fields that are accepted for the sake of old manifests and have no effect."""
    if isinstance(resource, v1alpha1.DynamoGraphDeployment):
        for name, service in resource.spec.services.items():
            where = f"spec.services.{name}"
            if service.autoscaling is not None:
                instead = "let an autoscaler address the scaling adapter"
                yield f"{where}.autoscaling is ignored; {instead}"
            if service.dynamo_namespace is not None:
                yield f"{where}.dynamoNamespace is ignored; the graph decides it"
            if service.epp_config is not None:
                yield f"{where}.eppConfig is kept but not used by this platform's picker"
    elif isinstance(resource, v1beta1.DynamoGraphDeployment):
        for index, component in enumerate(resource.spec.components):
            if component.epp_config is not None:
                where = f"spec.components[{index}]"
                yield f"{where}.eppConfig is kept but not used by this platform's picker"


def _graph_notes(graph: v1beta1.DynamoGraphDeployment) -> Iterator[str]:
    namespace = graph.metadata.namespace
    if namespace is not None and not _DNS_LABEL.match(namespace):
        yield f"metadata.namespace {namespace!r} is no namespace's name; a placeholder?"
    if graph.spec.restart is not None:
        yield "spec.restart is refused when the graph is created, and meant for a later change"
    if not graph.spec.components:
        yield "the graph has no components"
    for component in graph.spec.components:
        where = f"component {component.name}"
        if component.type not in ("frontend", "epp") and not _main_image(component):
            yield f"{where}: no image, because the pod template has no container main with one"


def _main_image(component: v1beta1.Component) -> str | None:
    template = component.pod_template or {}
    for container in template.get("spec", {}).get("containers", []):
        if container["name"] == MAIN:
            image: str | None = container.get("image")
            return image
    return None
