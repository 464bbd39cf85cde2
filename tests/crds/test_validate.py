"""All of the corpora is accepted; every mistake is named with path, value, expectation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamo_crds.load import read_documents
from dynamo_crds.problem import Problem
from dynamo_crds.validate import Report, validate_text

DELETE = object()


def changed(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of the manifest with the field at `path` set (or taken away)."""
    result = copy.deepcopy(manifest)
    node: Any = result
    for step in path[:-1]:
        node = node[step] if isinstance(node, list) else node.setdefault(step, {})
    if value is DELETE:
        del node[path[-1]]
    elif isinstance(node, list) and path[-1] == len(node):
        node.append(value)
    else:
        node[path[-1]] = value
    return result


def report_on(manifest: Any) -> Report:
    return validate_text(yaml.safe_dump(manifest, sort_keys=False), "graph.yaml")


def by_path(report: Report) -> dict[str, Problem]:
    return {problem.path: problem for problem in report.problems}


SPEC = ("spec",)
FRONT = ("spec", "components", 0)
DECODE = ("spec", "components", 1)
MAIN = (*DECODE, "podTemplate", "spec", "containers", 0)

# change, path of the problem, value found, fragment of what is expected
V1BETA1_MISTAKES: dict[str, tuple[tuple[Any, ...], Any, str, Any, str]] = {
    "negative replicas": (
        (*DECODE, "replicas"), -1, "spec.components[1].replicas", -1, "at least 0",
    ),
    "replicas as text": (
        (*DECODE, "replicas"), "2", "spec.components[1].replicas", "2", "without quotes",
    ),
    "replicas as a fraction": (
        (*DECODE, "replicas"), 1.5, "spec.components[1].replicas", 1.5, "an integer",
    ),
    "replicas beyond 32 bits": (
        (*DECODE, "replicas"), 2**31, "spec.components[1].replicas", 2**31, "at most 2147483647",
    ),
    "misspelt field": (
        (*DECODE, "replcas"), 2, "spec.components[1].replcas", 2, "replicas (nearest",
    ),
    "field of the other version": (
        (*DECODE, "componentType"), "worker", "spec.components[1].componentType", "worker", "type",
    ),
    "services in v1beta1": (
        (*SPEC, "services"), {"A": {}}, "spec.services", {"A": {}}, "components",
    ),
    "container's field at the component": (
        (*DECODE, "image"), "x", "spec.components[1].image", "x", "containers[main].image",
    ),
    "misspelt type": (
        (*DECODE, "type"), "prefil", "spec.components[1].type", "prefil", "did you mean prefill?",
    ),
    "unknown backend": (
        (*SPEC, "backendFramework"), "ollama", "spec.backendFramework", "ollama", "trtllm",
    ),
    "name missing": ((*DECODE, "name"), DELETE, "spec.components[1].name", None, "name"),
    "name with an underscore": (
        (*DECODE, "name"), "de_code", "spec.components[1].name", "de_code", "dashes",
    ),
    "name too long": (
        (*DECODE, "name"), "d" * 64, "spec.components[1].name", "d" * 64, "at most 63",
    ),
    "name taken": (
        (*DECODE, "name"), "Frontend", "spec.components[1].name", "Frontend", "item [0]",
    ),
    "name taken but for case": (
        (*DECODE, "name"), "frontend", "spec.components[1].name", "frontend", "more than case",
    ),
    "minAvailable above replicas": (
        (*DECODE, "minAvailable"), 3, "spec.components[1].minAvailable", 3, "at most replicas (2)",
    ),
    "one node of many": (
        (*DECODE, "multinode", "nodeCount"), 1, "spec.components[1].multinode.nodeCount", 1,
        "at least 2",
    ),
    "quantity": (
        (*DECODE, "sharedMemorySize"), "16GiB", "spec.components[1].sharedMemorySize", "16GiB",
        "16Gi",
    ),
    "quantity in the pod template": (
        (*MAIN, "resources", "limits", "memory"), "lots",
        "spec.components[1].podTemplate.spec.containers[0].resources.limits.memory", "lots",
        "a quantity",
    ),
    "container without a name": (
        (*MAIN, "name"), DELETE, "spec.components[1].podTemplate.spec.containers[0].name", None,
        "name",
    ),
    "sidecar without an image": (
        (*FRONT, "podTemplate", "spec", "containers", 1, "image"), DELETE,
        "spec.components[0].podTemplate.spec.containers[1].image", None, "an image",
    ),
    "two containers of one name": (
        (*FRONT, "podTemplate", "spec", "containers", 1, "name"), "main",
        "spec.components[0].podTemplate.spec.containers[1].name", "main", "item [0]",
    ),
    "args as one text": (
        (*MAIN, "args"), "--model tiny",
        "spec.components[1].podTemplate.spec.containers[0].args", "--model tiny", "a list",
    ),
    "number as an argument": (
        (*MAIN, "args"), ["--port", 8000],
        "spec.components[1].podTemplate.spec.containers[0].args[1]", 8000, '"8000"',
    ),
    "truth as an env value": (
        (*SPEC, "env", 0, "value"), True, "spec.env[0].value", True, '"true"',
    ),
    "value and valueFrom": (
        (*SPEC, "env", 0, "valueFrom"), {"fieldRef": {"fieldPath": "status.podIP"}},
        "spec.env[0].valueFrom", {"fieldRef": {"fieldPath": "status.podIP"}}, "either",
    ),
    "number as a label": (
        (*DECODE, "podTemplate", "metadata", "labels", "team"), 7,
        "spec.components[1].podTemplate.metadata.labels.team", 7, '"7"',
    ),
    "sidecar that is not there": (
        (*FRONT, "frontendSidecar"), "proxy", "spec.components[0].frontendSidecar", "proxy",
        "containers: main, logger",
    ),
    "eppConfig beside a worker": (
        (*DECODE, "eppConfig"), {"configMapRef": {"key": "k"}},
        "spec.components[1].eppConfig", {"configMapRef": {"key": "k"}}, "type: epp",
    ),
    "adapter as a truth value": (
        (*DECODE, "scalingAdapter"), True, "spec.components[1].scalingAdapter", True, "a mapping",
    ),
    "components as a map": (
        (*SPEC, "components"), {"a": {}}, "spec.components", {"a": {}}, "a list",
    ),
    "too many components": (
        (*SPEC, "components"), [{"name": f"c{i}"} for i in range(26)], "spec.components",
        [{"name": f"c{i}"} for i in range(26)], "at most 25",
    ),
    "incomplete restart order": (
        (*SPEC, "restart"), {"id": "1", "strategy": {"order": ["decode"]}},
        "spec.restart.strategy.order", ["decode"], "every component once: Frontend, decode",
    ),
    "two topology sources": (
        (*SPEC, "experimental"),
        {"kvTransferPolicy": {"domain": "rack", "labelKey": "a", "clusterTopologyName": "b"}},
        "spec.experimental.kvTransferPolicy",
        {"labelKey": "a", "clusterTopologyName": "b"}, "exactly one of",
    ),
    "preferred without a weight": (
        (*SPEC, "experimental"),
        {"kvTransferPolicy": {"domain": "rack", "labelKey": "a", "enforcement": "preferred"}},
        "spec.experimental.kvTransferPolicy.preferredWeight", None, "from 0 to 1",
    ),
    "checkpoint with job and reference": (
        (*DECODE, "experimental"),
        {"checkpoint": {"enabled": True, "checkpointRef": "a", "job": {}}},
        "spec.components[1].experimental.checkpoint.job", {}, "absent",
    ),
    "object name missing": (("metadata", "name"), DELETE, "metadata.name", None, "name"),
    "object name in capitals": (
        ("metadata", "name"), "Chat", "metadata.name", "Chat", "lower-case",
    ),
    "misspelt metadata": (
        ("metadata", "lables"), {"a": "b"}, "metadata.lables", {"a": "b"}, "labels (nearest",
    ),
    "unknown version": (
        ("apiVersion",), "nvidia.com/v1beta2", "apiVersion", "nvidia.com/v1beta2",
        "did you mean nvidia.com/v1beta1?",
    ),
    "misspelt kind": (
        ("kind",), "DynamoGraphDeploymnet", "kind", "DynamoGraphDeploymnet",
        "DynamoGraphDeployment",
    ),
    "kind missing": (("kind",), DELETE, "kind", None, "DynamoGraphDeployment"),
}  # fmt: skip

SERVICE = ("spec", "services", "Decode")
V1ALPHA1_MISTAKES: dict[str, tuple[tuple[Any, ...], Any, str, Any, str]] = {
    "negative replicas": (
        (*SERVICE, "replicas"), -1, "spec.services.Decode.replicas", -1, "at least 0",
    ),
    "components in v1alpha1": (
        (*SPEC, "components"), [], "spec.components", [], "services",
    ),
    "misspelt field": (
        (*SERVICE, "resource"), {}, "spec.services.Decode.resource", {}, "resources (nearest",
    ),
    "misspelt type": (
        (*SERVICE, "componentType"), "workr", "spec.services.Decode.componentType", "workr",
        "worker",
    ),
    "sub type": (
        (*SERVICE, "subComponentType"), "encode", "spec.services.Decode.subComponentType",
        "encode", "prefill, decode",
    ),
    "number of GPUs without quotes": (
        (*SERVICE, "resources", "limits", "gpu"), 1, "spec.services.Decode.resources.limits.gpu",
        1, '"1"',
    ),
    "shared memory without a size": (
        (*SERVICE, "sharedMemory"), {"disabled": False}, "spec.services.Decode.sharedMemory.size",
        None, "disabled: true",
    ),
    "shared memory of nothing": (
        (*SERVICE, "sharedMemory", "size"), "0", "spec.services.Decode.sharedMemory.size", "0",
        "above 0",
    ),
    "volume without a class": (
        (*SPEC, "pvcs", 0, "storageClass"), DELETE, "spec.pvcs[0].storageClass", None,
        "create is true",
    ),
    "service name": (
        ("spec", "services", "de_code"), {}, "spec.services.de_code", "de_code", "dashes",
    ),
    "service name but for case": (
        ("spec", "services", "decode"), {}, "spec.services.decode", "decode", "more than case",
    ),
    "main container's image as a number": (
        (*SERVICE, "extraPodSpec", "mainContainer", "image"), 1,
        "spec.services.Decode.extraPodSpec.mainContainer.image", 1, "a text",
    ),
}  # fmt: skip

ADAPTER_MISTAKES: dict[str, tuple[tuple[Any, ...], Any, str, Any, str]] = {
    "service of the other version": (
        ("spec", "dgdRef", "serviceName"), "x", "spec.dgdRef.serviceName", "x", "one of",
    ),
    "no replicas": (("spec", "replicas"), DELETE, "spec.replicas", None, "replicas"),
    "empty name": (("spec", "dgdRef", "name"), "", "spec.dgdRef.name", "", "not empty"),
}  # fmt: skip


def assert_mistake(
    text: str, mistake: tuple[tuple[Any, ...], Any, str, Any, str], file: str = "graph.yaml"
) -> None:
    where, replacement, path, value, expected = mistake
    report = report_on(changed(yaml.safe_load(text), where, replacement))
    problems = by_path(report)
    assert path in problems, [str(p) for p in report.problems]
    problem = problems[path]
    assert problem.value == value
    assert expected in problem.expected
    assert problem.file == file
    assert problem.line is not None
    assert path in str(problem)


@pytest.mark.parametrize("mistake", V1BETA1_MISTAKES.values(), ids=V1BETA1_MISTAKES)
def test_v1beta1_mistake_is_named(
    v1beta1_text: str, mistake: tuple[tuple[Any, ...], Any, str, Any, str]
) -> None:
    assert_mistake(v1beta1_text, mistake)


@pytest.mark.parametrize("mistake", V1ALPHA1_MISTAKES.values(), ids=V1ALPHA1_MISTAKES)
def test_v1alpha1_mistake_is_named(
    v1alpha1_text: str, mistake: tuple[tuple[Any, ...], Any, str, Any, str]
) -> None:
    assert_mistake(v1alpha1_text, mistake)


@pytest.mark.parametrize("mistake", ADAPTER_MISTAKES.values(), ids=ADAPTER_MISTAKES)
def test_adapter_mistake_is_named(
    adapter_text: str, mistake: tuple[tuple[Any, ...], Any, str, Any, str]
) -> None:
    assert_mistake(adapter_text, mistake)


def test_own_manifests_are_accepted(
    v1beta1_text: str, v1alpha1_text: str, adapter_text: str
) -> None:
    for text in (v1beta1_text, v1alpha1_text, adapter_text):
        report = validate_text(text, "graph.yaml")
        assert report.problems == []
        assert len(report.checked) == 1


def test_all_problems_of_a_file_come_at_once(v1beta1_text: str, adapter_text: str) -> None:
    graph = yaml.safe_load(v1beta1_text)
    graph["spec"]["components"][0]["replicas"] = -1
    graph["spec"]["components"][1].update(name="frontend", minAvailable=9, typ="decode")
    graph["spec"]["backendFramework"] = "llama"
    adapter = yaml.safe_load(adapter_text)
    adapter["spec"]["replicas"] = "two"
    report = validate_text(yaml.safe_dump_all([graph, adapter]), "both.yaml")
    assert {(p.document, p.path) for p in report.problems} == {
        (0, "spec.components[0].replicas"),
        (0, "spec.components[1].name"),
        (0, "spec.components[1].minAvailable"),
        (0, "spec.components[1].typ"),
        (0, "spec.backendFramework"),
        (1, "spec.replicas"),
    }


def test_lines_are_those_of_the_file(v1beta1_text: str) -> None:
    text = v1beta1_text.replace("sharedMemorySize: 16Gi", "sharedMemorySize: 16 gigabytes")
    (problem,) = validate_text("---\n" + text, "graph.yaml").problems
    assert problem.line == 1 + next(
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if "sharedMemorySize" in line
    )


def test_null_is_absent(v1beta1_text: str, v1alpha1_text: str) -> None:
    graph = yaml.safe_load(v1beta1_text)
    graph["spec"].update(labels=None, restart=None, experimental=None)
    graph["spec"]["components"][0].update(replicas=None, podTemplate=None)
    assert report_on(graph).problems == []
    graph = yaml.safe_load(v1alpha1_text)
    graph["spec"] = None
    assert report_on(graph).problems == []


def test_foreign_kinds_pass_with_a_note() -> None:
    text = "\n---\n".join(
        f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\nspec: {{anything: goes}}"
        for version, kind in (
            ("v1", "ConfigMap"),
            ("nvidia.com/v1beta1", "DynamoGraphDeploymentRequest"),
            ("nvidia.com/v1alpha1", "DynamoModel"),
            ("nvidia.com/v1alpha1", "DynamoComponentDeployment"),
        )
    )
    report = validate_text(text, "mixed.yaml")
    assert report.problems == []
    assert [note.split("kind ")[1].split()[0] for note in report.notes] == [
        "ConfigMap",
        "DynamoGraphDeploymentRequest",
        "DynamoModel",
        "DynamoComponentDeployment",
    ]
    assert all(note.startswith("not checked: kind ") for note in report.notes)


def test_one_name_twice_in_a_file(v1beta1_text: str) -> None:
    report = validate_text(f"{v1beta1_text}\n---\n{v1beta1_text}", "graph.yaml")
    (problem,) = report.problems
    assert (problem.document, problem.path, problem.value) == (1, "metadata.name", "chat")


def test_notes_on_what_is_accepted_but_not_used(v1alpha1_text: str) -> None:
    graph = yaml.safe_load(v1alpha1_text)
    graph["metadata"]["namespace"] = "<your-namespace>"
    graph["spec"]["services"]["Decode"].update(autoscaling={"enabled": True}, dynamoNamespace="x")
    report = report_on(graph)
    assert report.problems == []
    text = "\n".join(report.notes)
    for fragment in ("<your-namespace>", "Decode.autoscaling", "Decode.dynamoNamespace"):
        assert fragment in text


def corpus_files(corpora: Path) -> list[Path]:
    files = sorted((corpora / "manifests").glob("*.y*ml"))
    assert len(files) >= 100
    return files


def test_all_of_the_corpus_is_accepted(corpora: Path) -> None:
    ours = 0
    for file in corpus_files(corpora):
        report = validate_text(file.read_text(), file.name)
        assert report.problems == [], file.name
        ours += len(report.checked)
    assert ours >= 100


def _first_worker(graph: dict[str, Any]) -> tuple[Any, ...]:
    if "components" in graph["spec"]:
        items = graph["spec"]["components"]
        index = next(i for i, c in enumerate(items) if c.get("type") != "frontend")
        return ("spec", "components", index)
    services = graph["spec"]["services"]
    name = next(n for n, s in services.items() if s.get("componentType") != "frontend")
    return ("spec", "services", name)


Corruption = Callable[[dict[str, Any], tuple[Any, ...]], tuple[tuple[Any, ...], Any]]
CORRUPTIONS: dict[str, Corruption] = {
    "replicas": lambda graph, part: ((*part, "replicas"), "many"),
    "unknown": lambda graph, part: ((*part, "replica"), 1),
    "version": lambda graph, part: ((*part, "runtimeVersionOverride"), "v1.6"),
    "pack domain": lambda graph, part: ((*part, "topologyConstraint", "packDomain"), "Rack 1"),
    "backend": lambda graph, part: (("spec", "backendFramework"), "vLLM"),
    "metadata": lambda graph, part: (("metadata", "name"), "my graph"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corpus_manifests_with_one_mistake(corpora: Path, corruption: Corruption) -> None:
    checked = 0
    for file in corpus_files(corpora)[::6]:
        documents, _ = read_documents(file.read_text(), file.name)
        for document in documents:
            if not document.is_graph or not document.data.get("spec"):
                continue
            where, value = corruption(document.data, _first_worker(document.data))
            report = report_on(changed(document.data, where, value))
            assert len(report.problems) == 1, (file.name, [str(p) for p in report.problems])
            (problem,) = report.problems
            assert problem.path.endswith(str(where[-1]))
            assert problem.value == value
            assert problem.expected
            checked += 1
    assert checked >= 10
