"""Graphs written for Dynamo, all of them on the real cluster: what their conditions say is true.

None of their pods is created (their images are huge and their GPUs many): the namespaces have no
room for pods, and the conditions have to say so. What rendering knows about each graph has to be
there as well, and of some graphs what a person read off their files.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from dynamo_crds.load import Document, load_documents, parse_graph
from dynamo_operator.reconcile.gather import OPTIONAL_CHILDREN
from dynamo_operator.render import Note, render_with_notes
from dynamo_operator.render import Platform as RenderPlatform
from dynamo_operator.render.notes import RUNTIME_UNSUPPORTED

from e2e.operator import compatibility
from e2e.operator.labelled import CONDITIONS, LABELS, mislabelled
from e2e.operator.platform import Platform
from e2e.operator.space import Json, Space, condition

NO_PODS = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "no-pods"},
    "spec": {"hard": {"pods": "0"}},
}
NO_POD = r'exceeded quota|RuntimeClass "nvidia" not found'
"""Why pods can't be created here: the one for all, the other for graphs that ask for that class."""
SETTLED_S = 300.0


@dataclass(frozen=True, slots=True)
class Case:
    """One graph and the namespace that it goes to."""

    document: Document
    space: Space

    @property
    def name(self) -> str:
        return self.document.name

    def manifest(self) -> Json:
        """As it is written, but for the namespace that some leave to whoever uses them."""
        metadata = {k: v for k, v in self.document.data["metadata"].items() if k != "namespace"}
        return {**self.document.data, "metadata": metadata}


def documents() -> Iterator[Document]:
    folder = compatibility.manifests()
    if folder is None:
        pytest.skip("CORPORA is not set: it names the folder with real manifests")
    for path in sorted(folder.glob("*.yaml")):
        yield from (document for document in load_documents(path) if document.is_graph)


def test_the_page_is_current() -> None:
    found = list(documents())
    assert len(found) > 100
    folder = compatibility.manifests()
    assert folder is not None
    assert compatibility.PAGE.read_text() == compatibility.page(
        list(compatibility.corpus(folder))
    ), "run `python -m e2e.operator.compatibility`"


@pytest.fixture
def cases(platform: Platform) -> Iterator[list[Case]]:
    """Every graph, applied; graphs of the same name in different namespaces."""
    cluster = platform.system.cluster
    spaces: list[Space] = []
    taken: defaultdict[str, int] = defaultdict(int)
    found = []
    suffix = secrets.token_hex(2)
    try:
        for document in documents():
            place = taken[document.name]
            taken[document.name] += 1
            if place == len(spaces):
                space = Space(cluster, f"pods-corpus-{place}-{suffix}")
                space.create()
                space.apply(NO_PODS)
                spaces.append(space)
            found.append(Case(document, spaces[place]))
        for space in spaces:
            mine = [case.manifest() for case in found if case.space is space]
            whole = {"apiVersion": "v1", "kind": "List", "items": mine}
            space.kubectl("apply", "-f", "-", input=json.dumps(whole), timeout=400.0)
        yield found
    finally:
        for space in spaces:
            cluster.kubectl("delete", "namespace", space.name, "--wait=false")
        for space in spaces:
            cluster.kubectl("wait", "--for=delete", f"namespace/{space.name}", "--timeout=180s")


def served(space: Space) -> frozenset[str]:
    """The optional kinds that the cluster serves."""
    known = space.cluster.kubectl("api-resources", "-o", "name").stdout.split()
    return frozenset(
        f"{kind.group}/{kind.kind}"
        for kind in OPTIONAL_CHILDREN
        if f"{kind.plural}.{kind.group}" in known
    )


def notes(case: Case, apis: frozenset[str]) -> list[Note]:
    """What rendering says of the graph."""
    platform = RenderPlatform(namespace=case.space.name, apis=apis)
    return render_with_notes(parse_graph(case.document), platform).notes


@pytest.mark.timeout(700)
def test_every_graph_is_told_the_truth(cases: list[Case]) -> None:
    spaces = {case.space.name: case.space for case in cases}
    live: dict[tuple[str, str], Json] = {}

    def told() -> bool:
        """Whether all have been looked at, and their Deployments have tried to create pods."""
        for space in spaces.values():
            for graph in space.list("dgd"):
                live[space.name, graph["metadata"]["name"]] = graph
        return all(
            condition(graph, "Ready").get("status") == "False"
            and "does not exist yet" not in condition(graph, "Ready")["message"]
            and "is being updated" not in condition(graph, "Ready")["message"]
            and " pods are available" not in condition(graph, "Ready")["message"]
            for graph in live.values()
            if graph.get("spec", {}).get("components")
        )

    first = next(iter(spaces.values()))
    first.until(
        told,
        "every graph looked at",
        SETTLED_S,
        lambda: "\n".join(
            f"{key}: {condition(g, 'Ready').get('message')}" for key, g in live.items()
        ),
    )
    assert len(live) == len(cases) > 100
    apis = served(first)
    wrong = {
        (case.document.file, case.name): problem
        for case in cases
        if (problem := untrue(live[case.space.name, case.name], notes(case, apis)))
    }
    assert not wrong, "\n".join(f"{which}: {why}" for which, why in wrong.items())
    labelled = [case for case in cases if _file(case) in LABELS]
    assert len(labelled) == len(LABELS)
    contradicted = {
        _file(case): problem
        for case in labelled
        if (problem := contradiction(case, live[case.space.name, case.name]))
    }
    assert not contradicted


def _file(case: Case) -> str:
    return Path(case.document.file).name


def contradiction(case: Case, graph: Json) -> str:
    """What the status of a graph says otherwise than a person does; "" if nothing."""
    found = {type: condition(graph, type) for type in CONDITIONS}
    told = {type: c["message"] for type, c in found.items() if c.get("status") == "True"}
    return mislabelled(_file(case), told)


def untrue(graph: Json, known: list[Note]) -> str:
    """What the status of a graph says wrongly; "" if all of it is true."""
    components = graph.get("spec", {}).get("components") or []
    status: Any = graph["status"]
    wanted = {
        "RuntimeUnsupported": [n for n in known if n.reason == RUNTIME_UNSUPPORTED],
        "NotRendered": [n for n in known if n.is_omission],
        "Adapted": [n for n in known if n.reason != RUNTIME_UNSUPPORTED and not n.is_omission],
    }
    for type, expected in wanted.items():
        found = condition(graph, type)
        if (found.get("status") == "True") != bool(expected):
            return f"{type} is {found}, rendering says {expected}"
    ready = condition(graph, "Ready")
    if not components:
        return "" if "no components" in ready["message"] else str(ready)
    if status["state"] not in ("failed", "pending"):
        return f"state {status['state']}"
    lacking = {component["name"] for component in components} - set(status["components"])
    for name in lacking:
        if name not in ready["message"]:
            return f"nothing is said of {name}: {ready}"
    for component in components:
        about = status["components"].get(component["name"])
        if about is None or component.get("replicas") == 0:
            continue
        available = next(c for c in about["conditions"] if c["type"] == "Available")
        # Of a LeaderWorkerSet, nothing but Events says that its pods are refused.
        why = "engines" if about["componentKind"] == "LeaderWorkerSet" else NO_POD
        if available["status"] != "False" or not re.search(why, available["message"]):
            return f"{component['name']}: {available}"
    return "" if re.search(NO_POD, ready["message"]) else str(ready)


@pytest.mark.timeout(300)
def test_a_graph_of_nvidias_images_serves_with_ours(space: Space) -> None:
    """Their mocker, unchanged: image, command and flags are replaced, the Secret is what it wants,
    the folder that it works in is not in our image."""
    (document,) = (d for d in documents() if d.name == "mocker-agg")
    space.kubectl("create", "secret", "generic", "hf-token-secret", "--from-literal=HF_TOKEN=none")
    space.apply(document.data)
    space.wait_ready(document.name)
    adapted = space.condition(document.name, "Adapted")
    assert "dynamo worker sim" in adapted["message"]
    with openai.OpenAI(
        base_url=f"{space.url(document.name)}/v1", api_key="none", max_retries=0
    ) as client:
        (model,) = client.models.list()
        answer = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "hello"}], max_tokens=8
        )
    assert answer.choices[0].message.content
