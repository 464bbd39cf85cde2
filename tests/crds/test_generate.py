"""The generated CRDs: structural, small, up to date, and accepting what the models accept."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamo_crds.generate import DEFAULT_OUT, KINDS, WebhookService, definition, main
from dynamo_crds.load import load_documents
from dynamo_crds.schema import without_null

Json = dict[str, Any]

# Keys that a structural schema may have; the API server refuses or ignores all others.
ALLOWED = {
    "type",
    "description",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "default",
    "required",
    "properties",
    "additionalProperties",
    "items",
    "anyOf",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}
LIMITS = {
    "type",
    "format",
    "enum",
    "default",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "maxItems",
    "maxProperties",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
}
QUANTITY_OPTIONS = [{"type": "integer"}, {"type": "string"}]


@functools.cache
def crd(kind: str) -> Json:
    (found,) = [k for k in KINDS if k.kind == kind]
    loaded = yaml.load((DEFAULT_OUT / found.file).read_text(), yaml.CSafeLoader)
    assert isinstance(loaded, dict)
    return loaded


@functools.cache
def schemas() -> tuple[tuple[str, Json], ...]:
    return tuple(_schemas())


def _schemas() -> Iterator[tuple[str, Json]]:
    for kind in KINDS:
        for version in crd(kind.kind)["spec"]["versions"]:
            yield f"{kind.kind} {version['name']}", version["schema"]["openAPIV3Schema"]


def schema_of(kind: str, api_version: str) -> Json:
    return dict(schemas())[f"{kind} {api_version.split('/')[1]}"]


def nodes(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


def at(schema: Json, path: str) -> Json:
    """The node at a dotted path; `[]` steps into items or values."""
    for step in path.split("."):
        name = step.removesuffix("[]")
        schema = schema["properties"][name]
        if step.endswith("[]"):
            schema = schema.get("items") or schema["additionalProperties"]
    return schema


def test_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0
    print(capsys.readouterr().out)


def test_stale_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    assert main(["--out", str(tmp_path), "--check"]) == 0
    file = tmp_path / KINDS[0].file
    file.write_text(file.read_text() + "\n")
    assert main(["--out", str(tmp_path), "--check"]) == 1
    assert str(file) in capsys.readouterr().err


def test_files_are_small() -> None:
    for kind in KINDS:
        size = (DEFAULT_OUT / kind.file).stat().st_size
        print(f"{kind.file}: {size / 1024:.1f} KiB")
        assert size < 200 * 1024


def test_every_node_is_structural() -> None:
    seen = 0
    for label, schema in schemas():
        for path, node in nodes(schema):
            where = f"{label} {path}"
            seen += 1
            assert node.keys() <= ALLOWED, where
            if node.get("x-kubernetes-int-or-string"):
                assert "type" not in node, where
                assert node["anyOf"] == QUANTITY_OPTIONS, where
                continue
            assert "anyOf" not in node, where
            assert node["type"] in ("object", "array", "string", "integer", "number", "boolean")
            assert not ("properties" in node and "additionalProperties" in node), where
            assert set(node.get("required", [])) <= node.get("properties", {}).keys(), where
            if node["type"] == "array":
                assert "items" in node, where
            if "x-kubernetes-list-map-keys" in node:
                assert node["x-kubernetes-list-type"] == "map", where
                assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"])
            if node["type"] == "object" and not (
                "properties" in node or "additionalProperties" in node
            ):
                opaque = node.get("x-kubernetes-preserve-unknown-fields")
                assert opaque or path.endswith((".metadata", ".scalingAdapter")), where
            if "default" in node and "enum" in node:
                assert node["default"] in node["enum"], where
    assert seen > 700


def test_every_field_is_explained() -> None:
    for label, schema in schemas():
        for path, node in nodes(schema):
            named = path and not path.endswith(("[]", ".apiVersion", ".kind"))
            if named and path != ".metadata":
                assert node.get("description"), f"{label} {path}"


def test_names_columns_and_subresources() -> None:
    graph, adapter = (crd(kind.kind)["spec"] for kind in KINDS)
    assert graph["names"]["shortNames"] == ["dgd"]
    assert adapter["names"]["shortNames"] == ["dgdsa"]
    for spec in (graph, adapter):
        versions = {v["name"]: v for v in spec["versions"]}
        assert {n: (v["served"], v["storage"]) for n, v in versions.items()} == {
            "v1beta1": (True, True),
            "v1alpha1": (True, False),
        }
        assert versions["v1alpha1"]["deprecated"]
        assert all("status" in v["subresources"] for v in versions.values())
    columns = [[c["name"] for c in v["additionalPrinterColumns"]] for v in adapter["versions"]]
    assert columns == [
        ["DGD", "COMPONENT", "REPLICAS", "CURRENT", "AGE"],
        ["DGD", "SERVICE", "REPLICAS", "CURRENT", "AGE"],
    ]
    for version in graph["versions"]:
        names = [c["name"] for c in version["additionalPrinterColumns"]]
        assert names == ["Ready", "State", "Backend", "Age", "Why"]
    for version in adapter["versions"]:
        assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.replicas"
    for spec in (graph, adapter):
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            for column in version["additionalPrinterColumns"]:
                path = column["jsonPath"].removeprefix(".")
                if not path.startswith("metadata."):
                    assert at(schema, re.sub(r"\[\?.*?\)\]", "[]", path))


def test_two_shapes_are_never_served_without_a_webhook() -> None:
    kind = KINDS[0]
    conversion = definition(kind, WebhookService("serving", "our-hook"))["spec"]["conversion"]
    assert conversion["strategy"] == "Webhook"
    assert conversion["webhook"]["clientConfig"]["service"] == {
        "namespace": "serving",
        "name": "our-hook",
        "path": "/convert",
        "port": 443,
    }


def test_without_a_webhook_only_the_stored_version_is_served() -> None:
    for kind in KINDS:
        spec = definition(kind, None)["spec"]
        assert spec["conversion"] == {"strategy": "None"}
        assert [v["name"] for v in spec["versions"] if v["served"]] == ["v1beta1"]


def test_ours_can_be_told_from_dynamos() -> None:
    for kind in KINDS:
        labels = crd(kind.kind)["metadata"]["labels"]
        assert labels == {"app.kubernetes.io/managed-by": "dynamo-operator"}


def test_the_service_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--service", "serving/our-hook"]) == 0
    for kind in KINDS:
        loaded = yaml.safe_load((tmp_path / kind.file).read_text())
        service = loaded["spec"]["conversion"]["webhook"]["clientConfig"]["service"]
        assert (service["namespace"], service["name"]) == ("serving", "our-hook")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--service", "our-hook"])
    assert "expected NAMESPACE/NAME" in capsys.readouterr().err


def test_constraints_reach_the_schema() -> None:
    graph = schema_of("DynamoGraphDeployment", "nvidia.com/v1beta1")
    component = at(graph, "spec.components[]")
    assert component["required"] == ["name"]
    assert component["properties"]["replicas"] == {
        "type": "integer",
        "format": "int32",
        "minimum": 0,
        "maximum": 2147483647,
        "description": component["properties"]["replicas"]["description"],
    }
    assert component["properties"]["multinode"]["properties"]["nodeCount"]["default"] == 2
    assert component["properties"]["type"]["enum"] == [
        "frontend",
        "worker",
        "prefill",
        "decode",
        "planner",
        "epp",
    ]
    components = at(graph, "spec.components")
    assert components["maxItems"] == 25
    assert components["x-kubernetes-list-map-keys"] == ["name"]
    assert len(components["x-kubernetes-validations"]) == 2
    assert at(graph, "spec.env[]")["required"] == ["name"]
    services = at(schema_of("DynamoGraphDeployment", "nvidia.com/v1alpha1"), "spec.services")
    assert services["maxProperties"] == 25


def test_pod_templates_keep_what_is_not_declared() -> None:
    graph = schema_of("DynamoGraphDeployment", "nvidia.com/v1beta1")
    template = "spec.components[].podTemplate"
    for path in ("", ".metadata", ".spec", ".spec.containers[]", ".spec.initContainers[]"):
        node = at(graph, template + path)
        assert node["x-kubernetes-preserve-unknown-fields"] is True, path
        assert node["properties"], path
    assert at(graph, f"{template}.spec.containers[]")["required"] == ["name"]
    served = schema_of("DynamoGraphDeployment", "nvidia.com/v1alpha1")
    for path in ("extraPodSpec", "extraPodSpec.mainContainer", "livenessProbe", "readinessProbe"):
        node = at(served, f"spec.services[].{path}")
        assert node["x-kubernetes-preserve-unknown-fields"] is True, path


TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def lost(schema: Json, data: Any, path: str = "") -> Iterator[str]:
    """Where the API server would prune or refuse `data`: unknown fields, types, requirements."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(data, int | str):
            yield f"{path}: {data!r} is no integer or text"
        return
    if schema["type"] != "number" and not isinstance(data, TYPES[schema["type"]]):
        yield f"{path}: {data!r} is no {schema['type']}"
        return
    if "enum" in schema and data not in schema["enum"]:
        yield f"{path}: {data!r} is not in {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], data):
        yield f"{path}: {data!r} does not match"
    if isinstance(data, list):
        for index, item in enumerate(data):
            yield from lost(schema["items"], item, f"{path}[{index}]")
    if not isinstance(data, dict):
        return
    for name in schema.get("required", []):
        if name not in data:
            yield f"{path}.{name}: missing"
    for name, value in data.items():
        child = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
        if child is not None:
            yield from lost(child, value, f"{path}.{name}")
        elif path != ".metadata" and not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{path}.{name}: pruned"


def test_the_schema_loses_nothing_of_own_manifests(
    v1beta1_text: str, v1alpha1_text: str, adapter_text: str
) -> None:
    for text in (v1beta1_text, v1alpha1_text, adapter_text):
        manifest = without_null(yaml.safe_load(text))
        assert list(lost(schema_of(manifest["kind"], manifest["apiVersion"]), manifest)) == []
    manifest["spec"]["replcas"] = 1
    manifest["spec"]["replicas"] = "1"
    assert sorted(lost(schema_of(manifest["kind"], manifest["apiVersion"]), manifest)) == [
        ".spec.replcas: pruned",
        ".spec.replicas: '1' is no integer",
    ]


def test_the_schema_loses_nothing_of_the_corpus(corpora: Path) -> None:
    graphs = 0
    for file in sorted((corpora / "manifests").glob("*.y*ml")):
        for document in load_documents(file):
            if document.is_graph:
                schema = schema_of(document.kind, document.api_version)
                assert list(lost(schema, without_null(document.data))) == [], file.name
                graphs += 1
    assert graphs >= 100


def test_no_field_or_enum_of_dynamos_own_crds_is_missing(corpora: Path) -> None:
    """Everything that their schema declares outside pod templates is declared by ours, alike."""
    opaque = re.compile(
        r"\.(podTemplate|extraPodSpec|livenessProbe|readinessProbe|autoscaling\.\w+)(\.|\[|$)"
        r"|\.config(\.|$)"
    )
    compared = 0
    for kind in KINDS:
        theirs = yaml.load((corpora / "crds" / kind.file).read_text(), yaml.CSafeLoader)
        for version in theirs["spec"]["versions"]:
            ours = schema_of(kind.kind, f"nvidia.com/{version['name']}")
            own = dict(nodes(ours))
            for path, node in nodes(version["schema"]["openAPIV3Schema"]):
                if opaque.search(path):
                    continue
                where = f"{kind.kind} {version['name']} {path}"
                assert path in own, where
                compared += 1
                for key in LIMITS & node.keys():
                    if key != "default" or node[key] not in ("", False):
                        found = own[path].get(key)
                        expected = node[key]
                        if key == "enum":
                            found, expected = sorted(found), sorted(expected)
                        assert found == expected, f"{where} {key}"
    assert compared > 450
