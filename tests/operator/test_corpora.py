"""Every graph of the corpora renders, to the same bytes each time, to what Kubernetes can take."""

import os
import re
from pathlib import Path

import pytest
from dynamo_crds.load import load_graphs
from dynamo_operator.diagnosis.wording import bounded
from dynamo_operator.render import Platform, render_with_notes
from dynamo_operator.render.notes import RUNTIME_UNSUPPORTED, Note
from dynamo_operator.render.text import to_json

from e2e.operator.labelled import LABELS, mislabelled

NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")


def manifests() -> Path:
    folder = os.environ.get("CORPORA")
    if not folder:
        pytest.skip("CORPORA is not set: it names the folder with real manifests")
    return Path(folder) / "manifests"


def test_every_graph_renders() -> None:
    graphs = 0
    for path in sorted(manifests().glob("*.yaml")):
        for graph, again in zip(load_graphs(path), load_graphs(path), strict=True):
            graphs += 1
            rendered = render_with_notes(graph, Platform())
            second = render_with_notes(again, Platform())
            assert to_json(rendered.manifests) == to_json(second.manifests)
            workloads = {(c.workload_kind, c.workload) for c in rendered.components}
            assert len(workloads) == len(graph.spec.components), path.name
            objects = [(m["kind"], m["metadata"]["name"]) for m in rendered.manifests]
            assert workloads <= set(objects), path.name
            assert len(objects) == len(set(objects)), path.name
            for manifest in rendered.manifests:
                assert NAME.fullmatch(manifest["metadata"]["name"])
                assert all(LABEL.fullmatch(v) for v in manifest["metadata"]["labels"].values())
            templates = [t for c in rendered.components for t in c.templates.values()]
            for template in templates:
                spec = template["spec"]
                volumes = [volume["name"] for volume in spec.get("volumes", [])]
                assert len(volumes) == len(set(volumes)), path.name
                for container in spec["containers"] + spec.get("initContainers", []):
                    used = [m["name"] for m in container.get("volumeMounts", [])]
                    assert set(used) <= set(volumes), path.name
                    paths = [m["mountPath"] for m in container.get("volumeMounts", [])]
                    assert len(paths) == len(set(paths)), path.name
                    names = [e["name"] for e in container.get("env", [])]
                    assert len(names) == len(set(names)), path.name
                    ports = [p["containerPort"] for p in container.get("ports", [])]
                    assert len(ports) == len(set(ports)), path.name
    assert graphs > 100


def condition(note: Note) -> str:
    """Type of the condition that a note goes to."""
    if note.reason == RUNTIME_UNSUPPORTED:
        return "RuntimeUnsupported"
    return "NotRendered" if note.is_omission else "Adapted"


@pytest.mark.parametrize("apis", [None, frozenset[str]()], ids=["all kinds", "none"])
@pytest.mark.parametrize("file", LABELS)
def test_notes_say_what_a_person_read_off_the_file(file: str, apis: frozenset[str] | None) -> None:
    [graph] = load_graphs(manifests() / file)
    told: dict[str, list[str]] = {}
    for note in render_with_notes(graph, Platform(apis=apis)).notes:
        told.setdefault(condition(note), []).append(
            f"{note.component}: {note.reason}: {note.message}"
        )
    messages = {type: bounded("; ".join(texts)) for type, texts in told.items()}
    assert mislabelled(file, messages) == ""
