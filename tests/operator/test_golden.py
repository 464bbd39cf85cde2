"""Rendered graphs, byte for byte. `UPDATE_GOLDEN=1 pytest tests/operator` writes them afresh."""

import os
from pathlib import Path

import pytest
from dynamo_crds.load import load_graphs
from dynamo_operator.render import Platform, render_with_notes
from dynamo_operator.render.text import to_yaml

FOLDER = Path(__file__).parent
GRAPHS = sorted((FOLDER / "graphs").glob("*.yaml"))


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_rendered_graph_is_the_golden_one(path: Path, platform: Platform) -> None:
    [graph] = load_graphs(path)
    rendered = render_with_notes(graph, platform)
    text = "".join(f"# {note}\n" for note in rendered.notes) + to_yaml(rendered.manifests)
    golden = FOLDER / "golden" / path.name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_every_golden_file_has_its_graph() -> None:
    assert [p.name for p in GRAPHS] == sorted(p.name for p in (FOLDER / "golden").glob("*.yaml"))
