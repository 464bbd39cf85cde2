"""YAML as Kubernetes reads it, and clear words for what is no manifest at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from dynamo_crds import v1beta1
from dynamo_crds.load import (
    InvalidManifest,
    load_documents,
    load_graphs,
    parse,
    parse_graph,
    read_documents,
)
from dynamo_crds.validate import validate_text
from hypothesis import given
from hypothesis import strategies as st


def data_of(text: str) -> object:
    (document,), problems = read_documents(text, "x.yaml")
    assert problems == []
    assert document.problems == ()
    return document.data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("N", "N"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("True", True),
        ("~", None),
        ("", None),
        ("0x1F", 31),
        ("010", 8),
        ("08", 8.0),
        ("-7", -7),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("'1'", "1"),
        ("16Gi", "16Gi"),
        ("500m", "500m"),
        ("1.6.1", "1.6.1"),
        ("=", "="),
    ],
)
def test_scalars_are_read_by_the_rules_of_kubernetes(text: str, value: object) -> None:
    read = data_of(f"a: {text}")
    assert read == {"a": value}
    assert type(read["a"]) is type(value)  # type: ignore[index]


def test_keys_become_texts() -> None:
    assert data_of("{1: a, true: b, x: c}") == {"1": "a", "true": "b", "x": "c"}


def test_anchors_and_merges() -> None:
    text = """
base: &base {image: a, env: [1]}
main:
  <<: *base
  image: b
both:
  <<: [{image: c}, *base]
again: *base
"""
    assert data_of(text) == {
        "base": {"image": "a", "env": [1]},
        "main": {"image": "b", "env": [1]},
        "both": {"image": "c", "env": [1]},
        "again": {"image": "a", "env": [1]},
    }


def test_line_of_a_merged_field() -> None:
    text = "a: &a\n  x: 1\nb:\n  <<: *a\n"
    (document,), _ = read_documents(text, "x.yaml")
    assert document.line(("b", "x")) == 2
    assert document.line(("b", "absent")) == 3


def test_empty_documents_are_counted_but_left_out() -> None:
    documents, problems = read_documents("---\n---\na: 1\n---\n# nothing\n---\nb: 2\n", "x.yaml")
    assert problems == []
    assert [(d.index, d.data) for d in documents] == [(1, {"a": 1}), (3, {"b": 2})]


def test_a_key_given_twice(v1beta1_text: str) -> None:
    text = v1beta1_text.replace("    replicas: 2\n", "    replicas: 2\n    replicas: 3\n")
    (problem,) = validate_text(text, "x.yaml").problems
    assert problem.path == "spec.components[1].replicas"
    assert problem.message == "key given twice"
    assert text.splitlines()[(problem.line or 0) - 1] == "    replicas: 3"


def test_aliases_that_explode() -> None:
    lines = ["a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"]
    for before, name in zip("abcdefg", "bcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    report = validate_text("\n".join(lines), "bomb.yaml")
    assert any("aliases expand" in problem.message for problem in report.problems)


def test_an_alias_inside_itself() -> None:
    report = validate_text("a: &a\n  b: *a\n", "loop.yaml")
    assert [p.message for p in report.problems if p.path][:1] == ["endless alias"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 100_000, "nested too deep"),
        ("a: " + "{a: " * 300 + "1" + "}" * 300, "nested too deep"),
        ("a: " + "1" * 5000, "number too long"),
        ("a: .inf", "JSON has no such number"),
        ("a: 1e999", "JSON has no such number"),
        ("a: !!binary aGk=", "tag that Kubernetes does not know"),
        ("? [a]\n: b", "a key must be a text"),
        ("a: 1\nb: *c", "not YAML: found undefined alias"),
    ],
)
def test_yaml_that_is_no_json(text: str, message: str) -> None:
    report = validate_text(text, "x.yaml")
    assert report.problems[0].message == message
    assert report.problems[0].line is not None


def test_tabs_are_named() -> None:
    (problem,) = validate_text("spec:\n\tcomponents: []\n", "x.yaml").problems
    assert (problem.line, problem.message, problem.expected) == (
        2,
        "YAML is not indented with tabs",
        "spaces",
    )


def test_yaml_that_does_not_parse() -> None:
    (problem,) = validate_text("a: 1\nb: [1, 2\nc: 3\n", "x.yaml").problems
    assert problem.message.startswith("not YAML: ")
    assert problem.line == 3


def test_documents_before_a_syntax_error_are_still_checked(v1beta1_text: str) -> None:
    text = v1beta1_text.replace("replicas: 2", "replicas: -2") + "---\na: [\n"
    first, second = sorted(validate_text(text, "x.yaml").problems, key=lambda p: p.document)
    assert first.path == "spec.components[1].replicas"
    assert second.message.startswith("not YAML")


@pytest.mark.parametrize("text", ["", "---\n", "# only a comment\n", "\n\n"])
def test_empty_files(text: str) -> None:
    (problem,) = validate_text(text, "empty.yaml").problems
    assert problem.message == "the file holds no object"


@pytest.mark.parametrize("text", ["just text", "- a\n- b\n", "42"])
def test_a_document_that_is_no_mapping(text: str) -> None:
    (problem,) = validate_text(text, "x.yaml").problems
    assert problem.message == "not an object"
    assert "apiVersion, kind, metadata" in problem.expected


def test_json_is_accepted_also_with_tabs(v1beta1_text: str) -> None:
    graph = yaml.safe_load(v1beta1_text)
    for text in (json.dumps(graph), json.dumps(graph, indent="\t")):
        report = validate_text(text, "graph.json")
        assert report.problems == []
        assert report.checked == ["DynamoGraphDeployment chat"]


def test_a_list_of_objects(v1beta1_text: str, adapter_text: str) -> None:
    items = [yaml.safe_load(v1beta1_text), yaml.safe_load(adapter_text)]
    items[1]["spec"]["replicas"] = -1
    text = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": items})
    (problem,) = validate_text(text, "list.yaml").problems
    assert problem.path == "items[1].spec.replicas"
    assert problem.line is not None
    assert "-1" in text.splitlines()[problem.line - 1]


def test_parse_graph_takes_both_versions(v1beta1_text: str, v1alpha1_text: str) -> None:
    for text in (v1beta1_text, v1alpha1_text):
        (document,), _ = read_documents(text, "x.yaml")
        graph = parse_graph(document)
        assert isinstance(graph, v1beta1.DynamoGraphDeployment)
        assert [c.name.lower() for c in graph.spec.components] == ["frontend", "decode"]
        assert graph.spec.components[1].type == "decode"


def test_parse_graph_of_something_else(adapter_text: str) -> None:
    for text in (adapter_text, "apiVersion: v1\nkind: ConfigMap\n"):
        (document,), _ = read_documents(text, "x.yaml")
        with pytest.raises(InvalidManifest, match=r"x\.yaml:\d+: kind: .*DynamoGraphDeployment"):
            parse_graph(document)


def test_files(tmp_path: Path, v1beta1_text: str) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(f"apiVersion: v1\nkind: ConfigMap\n---\n{v1beta1_text}")
    assert [d.kind for d in load_documents(file)] == ["ConfigMap", "DynamoGraphDeployment"]
    assert [graph.metadata.name for graph in load_graphs(file)] == ["chat"]
    file.write_text("a: [")
    with pytest.raises(InvalidManifest, match="not YAML"):
        load_documents(file)
    with pytest.raises(FileNotFoundError):
        load_documents(tmp_path / "absent.yaml")


def test_a_parsed_object_gives_its_manifest_back(v1beta1_text: str, adapter_text: str) -> None:
    for text in (v1beta1_text, adapter_text):
        (document,), _ = read_documents(text, "x.yaml")
        assert parse(document).manifest() == yaml.safe_load(text)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abcnoyest01:-", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(json_values)
def test_json_comes_back_as_it_was(value: object) -> None:
    (document,), problems = read_documents(json.dumps({"value": value}), "x.json")
    assert problems == []
    assert document.data == {"value": value}
