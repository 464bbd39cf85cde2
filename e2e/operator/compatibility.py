"""What becomes here of graphs that were written for Dynamo: `docs/compatibility.md`.

`python -m e2e.operator.compatibility` judges every graph of the folder that CORPORA names by what
rendering says of it, and writes the page; `--check` says whether the page is current. The verdicts
are rendering's, nobody ran these graphs. That the operator tells the same on a real cluster, and of
some graphs what a person read off them, is what `test_compatibility.py` shows.
"""

from __future__ import annotations

import argparse
import enum
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo_crds.load import load_documents, parse_graph
from dynamo_crds.problem import InvalidManifest
from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_operator.render import Platform, Rendered, render_with_notes
from dynamo_operator.render.notes import (
    CONNECTOR_UNSUPPORTED,
    ENGINE_BUILD,
    RUNTIME_UNSUPPORTED,
    Note,
)
from dynamo_operator.render.platform import NVIDIA_PREFIX, OWN_REPOSITORY

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
PLACEHOLDERS = ("my-registry/", "<your-registry>/")
"""Registries that examples leave to whoever uses them."""
UNKNOWN = (RUNTIME_UNSUPPORTED, CONNECTOR_UNSUPPORTED)
"""Reasons of notes: the component runs something that nobody here made fit."""
MAPPED = Platform(images=dict.fromkeys((NVIDIA_PREFIX, *PLACEHOLDERS), OWN_REPOSITORY))
"""The platform of somebody who has named those registries as well."""
BUILDS = (
    "The plain image `vllm` takes their place; for another accelerator one of its own:"
    " `vllm-runtime-xpu`",
    "becomes `vllm-xpu`. Which of these graphs run on a newer release of vLLM was not tried.",
)
"""What is said of images that hold special builds."""
PICKING = ("frontend", "epp", "worker")


class Verdict(enum.Enum):
    """What becomes of a graph, in the words of the page."""

    AS_WRITTEN = "runs as it is written"
    MAPPED = "runs our images"
    ENGINE = "runs our programs, with vLLM for GPUs to be built"
    BUILD = "runs our programs, with a special build of vLLM to be made"
    REGISTRY = "runs our programs once its registry is mapped, with vLLM for GPUs to be built"
    PARTLY = "runs our programs but for a part without counterpart, with vLLM for GPUs to be built"
    UNSUPPORTED = "does not serve through our routing"
    EMPTY = "has nothing to run"
    REFUSED = "refused"


MEANING = {
    Verdict.AS_WRITTEN: "nothing about it is changed",
    Verdict.MAPPED: "NVIDIA's images and commands are replaced by ours, as the operator does by "
    "default, and `make images` builds all of them",
    Verdict.ENGINE: "the same with vLLM as engine, of which this project builds the one for CPU; "
    "the [image for GPUs](../images/README.md#vllm-for-gpus) is to be built as `vllm`",
    Verdict.BUILD: "written for vLLM with a model, a network or an accelerator of its own, "
    "[listed below](#builds-of-vllm); the condition `Adapted` names image and replacement",
    Verdict.REGISTRY: "the registry of its images has to be named, as in "
    "`--map-image my-registry/=dynamo-platform/`",
    Verdict.PARTLY: "what can't be rendered is left out, and `NotRendered` says so",
    Verdict.UNSUPPORTED: "its engines, or what they load, are none that this platform knows; they "
    "are started as written, and the conditions `RuntimeUnsupported` or `Adapted` say so",
    Verdict.EMPTY: "a form to fill in",
    Verdict.REFUSED: "`dynamo validate` does not take it",
}


@dataclass(frozen=True, slots=True)
class Judged:
    """One graph of the corpora."""

    file: str
    name: str
    version: str
    """In which it is written: "v1alpha1" or "v1beta1"."""
    verdict: Verdict
    why: tuple[str, ...]
    """What has no counterpart, each once."""
    builds: tuple[str, ...]
    """Images that hold special builds of vLLM, each once."""


def judge(graph: DynamoGraphDeployment) -> tuple[Verdict, tuple[str, ...]]:
    """What becomes of a graph by default, and why."""
    if not graph.spec.components:
        return Verdict.EMPTY, ()
    rendered = render_with_notes(graph, Platform())
    if not _lacking(rendered.notes):
        return _served(graph, rendered), ()
    better = render_with_notes(graph, MAPPED)
    remaining = _lacking(better.notes)
    kinds = {component.name: component.kind for component in better.components}
    unknown = {note.component for note in remaining if note.reason in UNKNOWN}
    why = tuple(dict.fromkeys(note.message for note in remaining))
    if any(kinds.get(name, "") in (*PICKING, "") for name in unknown):
        return Verdict.UNSUPPORTED, why
    if remaining:
        return Verdict.PARTLY, why
    return Verdict.REGISTRY, ()


def builds(graph: DynamoGraphDeployment) -> tuple[str, ...]:
    """The images of a graph whose builds of vLLM have to be made, each once."""
    notes = render_with_notes(graph, MAPPED).notes
    return tuple(dict.fromkeys(n.message.split()[0] for n in notes if n.reason == ENGINE_BUILD))


def _lacking(notes: Sequence[Note]) -> list[Note]:
    return [note for note in notes if note.reason in UNKNOWN or note.is_omission]


def _served(graph: DynamoGraphDeployment, rendered: Rendered) -> Verdict:
    """Which images a graph needs that lacks nothing else."""
    written = {
        container.get("image")
        for component in graph.spec.components
        for container in (component.pod_template or {}).get("spec", {}).get("containers") or ()
    }
    runs = {
        container.get("image")
        for component in rendered.components
        for template in component.templates.values()
        for container in template["spec"]["containers"]
    }
    if runs <= written:
        return Verdict.AS_WRITTEN
    if any(note.reason == ENGINE_BUILD for note in rendered.notes):
        return Verdict.BUILD
    return Verdict.ENGINE if Platform().image("vllm") in runs else Verdict.MAPPED


def corpus(folder: Path) -> Iterator[Judged]:
    """Every graph below `folder`, judged."""
    for path in sorted(folder.glob("*.yaml")):
        for document in load_documents(path):
            if not document.is_graph:
                continue
            version = str(document.data["apiVersion"]).rpartition("/")[2]
            name = str(document.data["metadata"]["name"])
            try:
                graph = parse_graph(document)
            except InvalidManifest as error:
                yield Judged(path.name, name, version, Verdict.REFUSED, (str(error),), ())
                continue
            yield Judged(path.name, name, version, *judge(graph), builds(graph))


def page(found: Sequence[Judged]) -> str:
    """The page, as Markdown."""
    counts = Counter(each.verdict for each in found)
    lines = [
        "# Graphs written for Dynamo",
        "",
        f"What becomes of {len(found)} complete graphs from Dynamo's repository: recipes, examples,"
        " tests. Rendering",
        "judges them and writes this page (`python -m e2e.operator.compatibility`): a row says"
        " which programs",
        "and images a graph becomes, not that it was run. None was but `mocker-agg`: there were"
        " neither the GPUs",
        "nor the weights.",
        "",
        "`make e2e` applies all of them to a real API server, in the version they are written in,"
        " which refuses",
        "none; compares the conditions of each with what rendering says, and of a dozen with what"
        " a person read",
        "off their files; and chats with `mocker-agg`. No pod of the others is created.",
        "",
        "| graphs | | |",
        "|---|---|---|",
        *(f"| {counts[verdict]} | {verdict.value} | {MEANING[verdict]} |" for verdict in Verdict),
        "",
        "Prefill and decode workers of a graph are [paired](prefill-decode.md); what hands the"
        " cache over is",
        "NIXL, which the engine's image has to hold.",
        "",
        "## What has no counterpart",
        "",
        "| graphs | why |",
        "|---|---|",
    ]
    reasons = Counter(why for each in found for why in each.why)
    ordered = sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
    lines += [f"| {count} | {_cell(why)} |" for why, count in ordered]
    images = Counter(image for each in found for image in each.builds)
    lines += ["", "## Builds of vLLM", "", *BUILDS, "", "| graphs | image |", "|---|---|"]
    lines += [f"| {count} | `{image}` |" for image, count in sorted(images.items())]
    lines += ["", "## Each of them", "", "| file | graph | version | |", "|---|---|---|---|"]
    lines += [
        f"| {_short(each.file)} | {each.name} | {each.version} | {each.verdict.value} |"
        for each in found
    ]
    return "\n".join(lines) + "\n"


def _short(file: str) -> str:
    """The file's path in Dynamo's repository."""
    return file.replace("__", "/")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def manifests() -> Path | None:
    """The folder of real manifests, if CORPORA names one."""
    folder = os.environ.get("CORPORA")
    return Path(folder) / "manifests" if folder else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is stale")
    options = parser.parse_args()
    folder = manifests()
    if folder is None:
        parser.error("CORPORA is not set: it names the folder with real manifests")
    text = page(list(corpus(folder)))
    if not options.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.stderr.write(f"{PAGE} is out of date\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
