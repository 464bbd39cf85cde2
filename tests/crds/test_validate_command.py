"""`dynamo validate`: what it prints and the status it ends with."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from dynamo_cli.validate_command import validate
from typer.testing import CliRunner, Result

app = typer.Typer()
app.command()(validate)


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def test_a_graph_in_order(tmp_path: Path, v1beta1_text: str) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(v1beta1_text)
    result = run(file)
    assert result.exit_code == 0
    assert f"ok     {file}: DynamoGraphDeployment chat" in result.stdout


def test_mistakes_are_shown_with_path_line_value_and_expectation(
    tmp_path: Path, v1beta1_text: str
) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(v1beta1_text.replace("replicas: 2", "replcas: 2"))
    result = run(file)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == f"wrong  {file}: 1 mistake"
    assert lines[1] == "  spec.components[1].replcas: unknown field (line 23)"
    assert lines[2].split() == ["found", "2"]
    assert lines[3].split(maxsplit=1) == ["expected", "replicas (nearest known field)"]


def test_a_directory_means_its_manifests(
    tmp_path: Path, v1beta1_text: str, v1alpha1_text: str
) -> None:
    (tmp_path / "a.yaml").write_text(v1beta1_text)
    (tmp_path / "b.yml").write_text(v1alpha1_text)
    (tmp_path / "c.txt").write_text("not looked at: [")
    result = run(tmp_path)
    assert result.exit_code == 0
    assert result.stdout.count("ok  ") == 2
    (tmp_path / "c.yaml").write_text("broken: [")
    assert run(tmp_path).exit_code == 1


def test_standard_input(v1beta1_text: str) -> None:
    assert run("-", stdin=v1beta1_text).exit_code == 0
    result = run("-", stdin=v1beta1_text.replace("v1beta1", "v1beta3"))
    assert result.exit_code == 1
    assert "wrong  <stdin>" in result.stdout
    assert "did you mean nvidia.com/v1beta1?" in result.stdout


def test_a_path_that_is_wrong(tmp_path: Path, v1beta1_text: str) -> None:
    (tmp_path / "graph.yaml").write_text(v1beta1_text)
    result = run(tmp_path / "grahp.yaml", tmp_path / "graph.yaml")
    assert result.exit_code == 2
    assert f"did you mean {tmp_path / 'graph.yaml'}?" in result.stderr
    assert "ok  " in result.stdout  # the others are still checked
    result = run(tmp_path / "absent" / "graph.yaml")
    assert result.exit_code == 2
    assert f"no directory {tmp_path / 'absent'}" in result.stderr


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty")
    assert (result.exit_code, "no *.yaml" in result.stderr) == (2, True)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    result = run(binary)
    assert (result.exit_code, "UTF-8" in result.stderr) == (2, True)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path, v1beta1_text: str) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(v1beta1_text, encoding="utf-8-sig")
    assert run(file).exit_code == 0


def test_an_empty_file_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text("")
    result = run(file)
    assert result.exit_code == 1
    assert "the file holds no object" in result.stdout


def test_text_in_brackets_is_not_markup(tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text("kind: '[red]x[/red]'\napiVersion: v1\nmetadata: {name: '[b]'}\n")
    result = run(file)
    assert result.exit_code == 0
    assert "kind [red]x[/red]" in result.stdout


@pytest.mark.parametrize("folder", ["manifests"])
def test_the_corpus(corpora: Path, folder: str) -> None:
    result = run(corpora / folder)
    assert result.exit_code == 0
    assert result.stdout.count("ok  ") >= 114
