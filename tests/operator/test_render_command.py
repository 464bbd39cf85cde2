"""`dynamo render`, as a process runs it."""

import json
from pathlib import Path

import pytest
import typer
import yaml
from dynamo_cli.render_command import render
from typer.testing import CliRunner, Result

FOLDER = Path(__file__).parent


def run(*args: str, stdin: str | None = None) -> Result:
    app = typer.Typer()
    app.command()(render)
    return CliRunner().invoke(app, list(args), input=stdin)


def test_yaml_documents_and_notes() -> None:
    result = run(str(FOLDER / "graphs" / "disaggregated.yaml"), "-n", "here")
    assert result.exit_code == 0
    documents = list(yaml.safe_load_all(result.stdout))
    assert {d["metadata"]["namespace"] for d in documents} == {"here"}
    assert [d["kind"] for d in documents].count("Deployment") == 3
    assert "pd: component Prefill: RuntimeMapped" in result.stderr


def test_json_list_from_standard_input() -> None:
    text = (FOLDER / "graphs" / "aggregated.yaml").read_text()
    result = run("-", "-o", "json", stdin=text)
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    assert listed["kind"] == "List"
    assert "chat-worker" in [item["metadata"]["name"] for item in listed["items"]]


def test_all_graphs_of_a_file_are_rendered(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    graph = {"apiVersion": "nvidia.com/v1beta1", "kind": "DynamoGraphDeployment"}
    worker = {"components": [{"name": "F", "type": "frontend"}]}
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
    documents = [{**graph, "metadata": {"name": n}, "spec": worker} for n in ("a", "b")]
    file.write_text(yaml.safe_dump_all([documents[0], other, documents[1]]))
    result = run(str(file))
    documents = yaml.safe_load_all(result.stdout)
    names = [d["metadata"]["name"] for d in documents if d["kind"] == "Deployment"]
    assert names == ["a-f", "b-f"]


@pytest.mark.parametrize(
    ("text", "complaint", "status"),
    [
        ("kind: ConfigMap\napiVersion: v1\n", "no DynamoGraphDeployment", 1),
        (
            "kind: DynamoGraphDeployment\napiVersion: nvidia.com/v1beta1\nmetadata: {name: g}\n"
            "spec: {components: [{name: a, replica: 1}]}\n",
            "spec.components[0].replica",
            1,
        ),
        ("a: [", "not YAML", 1),
    ],
)
def test_a_mistake_is_named_and_nothing_is_printed(
    tmp_path: Path, text: str, complaint: str, status: int
) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(text)
    result = run(str(file))
    assert result.exit_code == status
    assert complaint in result.stderr
    assert result.stdout == ""


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = run(str(tmp_path / "missing.yaml"))
    assert result.exit_code == 2
    assert "missing.yaml" in result.stderr
