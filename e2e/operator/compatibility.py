"""What becomes here of graphs that were written for Dynamo: `docs/compatibility.md`.

`python -m e2e.operator.compatibility` judges every graph of the folder that CORPORA names by what
rendering says of it, and writes the page; `--check` says whether the page is current. That the
operator tells the same on a real cluster is what `test_compatibility.py` shows.
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
from dynamo_operator.render.notes import CONNECTOR_UNSUPPORTED, RUNTIME_UNSUPPORTED, Note
from dynamo_operator.render.platform import NVIDIA_PREFIX, OWN_REPOSITORY

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
PLACEHOLDERS = ("my-registry/", "<your-registry>/")
"""Registries that examples leave to whoever uses them."""
UNKNOWN = (RUNTIME_UNSUPPORTED, CONNECTOR_UNSUPPORTED)
"""Reasons of notes: the component runs something that nobody here made fit."""
PICKING = ("frontend", "epp", "worker")


class Verdict(enum.Enum):
    """What becomes of a graph, in the words of the page."""

    AS_WRITTEN = "serves as it is written"
    MAPPED = "serves with our images"
    REGISTRY = "serves once its registry is mapped"
    PARTLY = "serves, but for parts that have no counterpart"
    UNSUPPORTED = "does not serve through our routing"
    EMPTY = "has nothing to run"
    REFUSED = "refused"


MEANING = {
    Verdict.AS_WRITTEN: "nothing about it is changed",
    Verdict.MAPPED: "NVIDIA's images and commands are replaced by ours, as the operator does by "
    "default",
    Verdict.REGISTRY: "its images lie in a registry that has to be named, as in "
    "`--map-image my-registry/=dynamo-platform/`",
    Verdict.PARTLY: "requests are served; the rest of it runs as written, or is left out",
    Verdict.UNSUPPORTED: "its engines, or what they load, are none that this platform knows; they "
    "are started as written, and the conditions `RuntimeUnsupported` or `Adapted` say so",
    Verdict.EMPTY: "a form to fill in",
    Verdict.REFUSED: "the API server does not take it",
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


def judge(graph: DynamoGraphDeployment) -> tuple[Verdict, tuple[str, ...]]:
    """What becomes of a graph by default, and why."""
    if not graph.spec.components:
        return Verdict.EMPTY, ()
    platform = Platform()
    rendered = render_with_notes(graph, platform)
    lacking = _lacking(rendered.notes)
    if not lacking:
        return (Verdict.MAPPED if _changed(graph, rendered) else Verdict.AS_WRITTEN), ()
    mapped = Platform(images=dict.fromkeys((NVIDIA_PREFIX, *PLACEHOLDERS), OWN_REPOSITORY))
    better = render_with_notes(graph, mapped)
    remaining = _lacking(better.notes)
    kinds = {component.name: component.kind for component in better.components}
    unknown = {note.component for note in remaining if note.reason in UNKNOWN}
    why = tuple(dict.fromkeys(note.message for note in remaining))
    if any(kinds.get(name, "") in (*PICKING, "") for name in unknown):
        return Verdict.UNSUPPORTED, why
    if remaining:
        return Verdict.PARTLY, why
    return Verdict.REGISTRY, ()


def _lacking(notes: Sequence[Note]) -> list[Note]:
    return [note for note in notes if note.reason in UNKNOWN or note.is_omission]


def _changed(graph: DynamoGraphDeployment, rendered: Rendered) -> bool:
    """Whether another image runs than was written."""
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
    return not runs <= written


def corpus(folder: Path) -> Iterator[Judged]:
    """Every graph below `folder`, judged."""
    for path in sorted(folder.glob("*.yaml")):
        for document in load_documents(path):
            if not document.is_graph:
                continue
            version = str(document.data["apiVersion"]).rpartition("/")[2]
            name = str(document.data["metadata"]["name"])
            try:
                verdict, why = judge(parse_graph(document))
            except InvalidManifest as error:
                verdict, why = Verdict.REFUSED, (str(error),)
            yield Judged(path.name, name, version, verdict, why)


def page(found: Sequence[Judged]) -> str:
    """The page, as Markdown."""
    counts = Counter(each.verdict for each in found)
    lines = [
        "# Graphs written for Dynamo",
        "",
        f"What becomes of {len(found)} complete graphs from Dynamo's repository: recipes, examples,"
        " tests. All are",
        "accepted in the version they are written in, and each gets conditions that say what was"
        " changed or left",
        "out. *Serves* means that all of it is rendered to programs of this platform; GPUs and"
        " weights are no part",
        "of that.",
        "",
        "Written by `python -m e2e.operator.compatibility`. `make e2e` checks on a real cluster"
        " that the operator",
        "says the same.",
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
