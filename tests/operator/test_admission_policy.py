"""What admission lets in, in both versions, and what it says of the rest."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from dynamo_crds.conversion import convert
from dynamo_crds.load import load_documents
from dynamo_crds.schema import without_null
from dynamo_operator.admission.policy import Verdict, judge
from dynamo_operator.admission.review import Malformed, Request, answer, read_request, shortened
from dynamo_operator.render import Platform

Json = dict[str, Any]
PLATFORM = Platform(image_tag="test")
V1ALPHA1 = "nvidia.com/v1alpha1"
V1BETA1 = "nvidia.com/v1beta1"


@pytest.fixture(scope="module")
def corpora() -> Path:
    folder = os.environ.get("CORPORA")
    if not folder:
        pytest.skip("CORPORA is not set: it names the folder with real manifests")
    return Path(folder)


def worker(name: str = "Worker", **fields: Any) -> Json:
    main = {"name": "main", "image": "dynamo-platform/worker:1", "command": ["dynamo", "worker"]}
    return {
        "name": name,
        "type": "worker",
        "podTemplate": {"spec": {"containers": [main]}},
    } | fields


def graph(*components: Json, annotations: dict[str, str] | None = None, **spec: Any) -> Json:
    metadata: Json = {"name": "chat", "namespace": "team", "uid": "u", "managedFields": [{}]}
    if annotations:
        metadata["annotations"] = annotations
    return {
        "apiVersion": V1BETA1,
        "kind": "DynamoGraphDeployment",
        "metadata": metadata,
        "spec": {"components": list(components), **spec},
    }


def create(manifest: Json) -> Verdict:
    return judge(Request("1", "CREATE", manifest["kind"], "team", manifest), PLATFORM)


def update(old: Json, new: Json) -> Verdict:
    return judge(Request("1", "UPDATE", new["kind"], "team", new, old), PLATFORM)


def denials(verdict: Verdict) -> list[str]:
    return [str(denial) for denial in verdict.denials]


def changed(manifest: Json, *path: str | int, to: Any) -> Json:
    """A copy with one field of its spec set; `to=None` takes it away."""
    result = copy.deepcopy(manifest)
    node = result["spec"]
    for step in path[:-1]:
        node = node[step]
    if to is None:
        node.pop(path[-1], None)
    else:
        node[path[-1]] = to
    return result


def test_a_graph_in_order_is_let_in_and_its_workloads_are_to_be_tried() -> None:
    verdict = create(graph(worker(), {"name": "Frontend", "type": "frontend"}))
    assert verdict.denials == ()
    assert sorted(trial.label for trial in verdict.trials) == [
        "Deployment chat-frontend",
        "Deployment chat-worker",
        "Service chat-frontend",
        "Service chat-worker",
    ]


def test_every_mistake_is_named_at_once_with_what_would_be_right() -> None:
    manifest = graph(worker(replicas=-1), worker("Other", frontendSidecar="proxy", type="wroker"))
    assert denials(create(manifest)) == [
        "spec.components[0].replicas: too small: found -1, expected at least 0",
        'spec.components[1].frontendSidecar: frontendSidecar must name a container: found "proxy", '
        "expected a container of podTemplate.spec.containers: main",
        'spec.components[1].type: not allowed: found "wroker", expected frontend, worker, prefill, '
        "decode, planner or epp (did you mean worker?)",
    ]


def test_the_restart_order_must_be_complete_and_known() -> None:
    old = graph(worker("A"), worker("B"))
    new = changed(old, "restart", to={"id": "1", "strategy": {"order": ["A", "C"]}})
    (denial,) = denials(update(old, new))
    assert denial.startswith("spec.restart.strategy.order: ")
    assert denial.endswith('found ["A", "C"], expected every component once: A, B')


@pytest.mark.parametrize(
    ("path", "before", "after", "expected"),
    [
        (
            ("backendFramework",), "vllm", "sglang",
            "spec.backendFramework: can't be changed from vllm to sglang; make a graph of another",
        ),
        (
            ("backendFramework",), None, "vllm",
            "spec.backendFramework: can't be changed from unset to vllm",
        ),
        (
            ("components", 0, "type"), "prefill", "decode",
            "spec.components[0].type: can't be changed from prefill to decode; remove the",
        ),
        (
            ("components", 0, "type"), "worker", None,
            "spec.components[0].type: can't be changed from worker to unset",
        ),
        (
            ("components", 0, "name"), "Worker", "worker",
            "spec.components[0].name: can't be changed from Worker to worker; remove the",
        ),
        (
            ("components", 0, "multinode"), None, {"nodeCount": 2},
            "spec.components[0].multinode: can't be changed from one node to several",
        ),
        (
            ("components", 0, "multinode"), {"nodeCount": 2}, None,
            "spec.components[0].multinode: can't be changed from several to one",
        ),
    ],
)  # fmt: skip
def test_what_runs_cannot_become_something_else(
    path: tuple[str | int, ...], before: Any, after: Any, expected: str
) -> None:
    base = graph(worker())
    verdict = update(changed(base, *path, to=before), changed(base, *path, to=after))
    (denial,) = denials(verdict)
    assert denial.startswith(expected)
    assert verdict.denials[0].reason == "immutable"


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        (("components", 0, "type"), None, "worker"),
        (("components", 0, "multinode"), {"nodeCount": 2}, {"nodeCount": 4}),
        (("components", 0, "name"), "A", "B"),
        (("components", 0, "replicas"), 1, 5),
        (("priorityClassName",), None, "high"),
    ],
)
def test_all_else_may_change(path: tuple[str | int, ...], before: Any, after: Any) -> None:
    base = graph(worker())
    assert denials(update(changed(base, *path, to=before), changed(base, *path, to=after))) == []


def test_what_server_side_apply_cannot_tell_apart_is_refused() -> None:
    """Kubernetes lets a creation pass, and then the operator could never apply it."""
    twice = worker()
    logger: Json = {"name": "logger", "image": "x", "ports": [{"containerPort": 81}]}
    logger["env"] = [{"name": "A"}, {"name": "B"}, {"name": "A"}]
    logger["ports"] += [{"containerPort": 81, "protocol": "UDP"}, {"containerPort": 81}]
    containers = twice["podTemplate"]["spec"]["containers"]
    containers.append(logger)
    containers[0]["volumeMounts"] = [{"name": "v", "mountPath": "/v"}] * 2
    at = "spec.components[0].podTemplate.spec.containers"
    assert sorted(str(d).split(" is ")[0] for d in create(graph(twice)).denials) == [
        f"{at}[0].volumeMounts[0].mountPath: /v",
        f"{at}[1].env[0].name: A",
        f"{at}[1].ports[0].containerPort: 81",
    ]
    containers[0]["env"] = [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]
    assert not [d for d in denials(create(graph(twice))) if "containers[0].env" in d]
    assert denials(update(graph(twice), changed(graph(twice), "labels", to={"a": "b"})))
    assert not denials(
        update(graph(twice), changed(graph(twice), "components", 0, "replicas", to=3))
    )


def test_the_workload_provider_stays() -> None:
    provider = "nvidia.com/workload-provider"
    old = graph(worker(), annotations={provider: "component"})
    (denial,) = denials(update(old, graph(worker(), annotations={provider: "grove"})))
    assert denial.startswith(
        f'metadata.annotations["{provider}"]: can\'t be changed from component'
    )
    assert denials(update(graph(worker()), old)) == []


def test_fields_are_named_as_v1alpha1_has_them() -> None:
    old: Json = {
        "apiVersion": V1ALPHA1,
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": {
            "services": {
                "Worker": {
                    "componentType": "worker",
                    "subComponentType": "prefill",
                    "autoscaling": {"enabled": True},
                    "extraPodSpec": {"mainContainer": {"image": "x"}},
                }
            }
        },
    }
    verdict = create(old)
    assert verdict.denials == ()
    assert verdict.warnings[0] == (
        "spec.services.Worker.autoscaling is ignored; let an autoscaler address the scaling adapter"
    )
    new = changed(old, "services", "Worker", "subComponentType", to="decode")
    (denial,) = denials(update(old, new))
    assert denial.startswith("spec.services.Worker.componentType: can't be changed from prefill to")
    wrong = changed(old, "services", "Worker", "componentType", to="wroker")
    (denial,) = denials(create(wrong))
    assert denial.startswith("spec.services.Worker.componentType: unknown componentType")


def test_an_update_is_not_denied_for_what_was_wrong_before() -> None:
    old = graph(worker(frontendSidecar="proxy"))
    assert denials(update(old, changed(old, "components", 0, "replicas", to=3))) == []
    worse = changed(old, "components", 0, "replicas", to=-3)
    assert [d.split(":")[0] for d in denials(update(old, worse))] == ["spec.components[0].replicas"]


def test_status_labels_and_finalizers_are_nobodys_business() -> None:
    old = graph(worker(frontendSidecar="proxy"))
    new = {**old, "status": {"state": "failed"}, "metadata": {**old["metadata"], "finalizers": []}}
    assert update(old, new) == Verdict()
    deleted = changed(old, "components", 0, "type", to="decode")
    deleted["metadata"] = {**old["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
    assert update(old, deleted) == Verdict()


def test_other_operations_and_kinds_pass() -> None:
    old = graph(worker(replicas=-1))
    assert judge(Request("1", "DELETE", old["kind"], "team", None, old), PLATFORM) == Verdict()
    other = {**old, "kind": "DynamoModel"}
    assert create(other) == Verdict()


def test_adapters_are_checked() -> None:
    adapter: Json = {
        "apiVersion": V1BETA1,
        "kind": "DynamoGraphDeploymentScalingAdapter",
        "metadata": {"name": "chat-worker", "namespace": "team"},
        "spec": {"replicas": 1, "dgdRef": {"name": "chat", "componentName": "Worker"}},
    }
    assert create(adapter) == Verdict()
    (denial,) = denials(create(changed(adapter, "dgdRef", "componentName", to=None)))
    assert denial.startswith("spec.dgdRef.componentName: required field is missing")


def test_replicas_under_an_adapter_are_answered_with_the_command_that_works() -> None:
    old = graph(worker(replicas=1, scalingAdapter={}))
    new = changed(old, "components", 0, "replicas", to=4)
    assert update(old, new).warnings == (
        "spec.components[0].replicas is ignored while the scaling adapter chat-worker rules: "
        "kubectl scale dgdsa/chat-worker --replicas=4",
    )
    assert update(old, new).trials == ()
    seeded = changed(graph(worker(replicas=1)), "components", 0, "scalingAdapter", to={})
    assert update(graph(worker(replicas=1)), seeded).warnings == ()


def test_a_rollback_that_nobody_would_carry_out_is_told() -> None:
    odd = graph(worker(), annotations={"nvidia.com/auto-rollback": "yes"})
    told = [warning for warning in create(odd).warnings if "auto-rollback" in warning]
    assert told == [
        "metadata.annotations[nvidia.com/auto-rollback]: 'yes' switches nothing on; \"true\" does"
    ]
    assert "auto-rollback" not in str(
        update(odd, graph(worker(replicas=2), annotations={"nvidia.com/auto-rollback": "yes"}))
    )
    right = graph(worker(), annotations={"nvidia.com/auto-rollback": "True"})
    assert "auto-rollback" not in str(create(right))


def test_an_update_says_only_what_it_brought() -> None:
    def with_grove(*names: str) -> Json:
        grove = {"experimental": {"grove": {"forceScalingGroup": True}}}
        return graph(*(worker(name, **(grove if name in names else {})) for name in ("A", "B")))

    assert [w for w in create(with_grove("A")).warnings if "rove" in w]
    assert [w for w in update(with_grove(), with_grove("A")).warnings if "rove" in w]
    both = update(with_grove("A"), with_grove("A", "B")).warnings
    assert [w.split(":")[0] for w in both if "rove" in w] == ["component B"]


def test_only_what_changed_is_tried() -> None:
    old = graph(worker("A"), worker("B"))
    other = copy.deepcopy(old)
    other["spec"]["components"][1]["podTemplate"]["spec"]["containers"][0]["args"] = ["--x"]
    labels = {trial.label for trial in update(old, other).trials}
    assert "Deployment chat-b" in labels
    assert not any(label.startswith("Service") for label in labels)
    assert update(old, changed(old, "components", 0, "replicas", to=9)).trials == ()


def test_every_graph_of_the_corpus_is_let_in_in_both_versions(corpora: Path) -> None:
    graphs = 0
    for file in sorted((corpora / "manifests").glob("*.y*ml")):
        for document in load_documents(file):
            if not document.is_graph:
                continue
            manifest = without_null(document.data)
            (other,) = {V1ALPHA1, V1BETA1} - {document.api_version}
            for version in (manifest, convert(manifest, other)):
                verdict = create(version)
                assert denials(verdict) == [], file.name
                assert verdict.trials or "nothing will run" in verdict.warnings[0], file.name
                assert update(version, version) == Verdict()
            graphs += 1
    assert graphs >= 100


# --- reviews --------------------------------------------------------------------------------------


def test_a_review_is_read_and_answered() -> None:
    manifest = graph(worker(replicas=-1, type="x"))
    request = read_request(
        {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {
                "uid": "7",
                "kind": {"group": "nvidia.com", "version": "v1beta1", "kind": manifest["kind"]},
                "operation": "CREATE",
                "namespace": "team",
                "object": manifest,
                "oldObject": None,
                "dryRun": True,
            },
        }
    )
    assert (request.uid, request.kind, request.dry_run) == ("7", manifest["kind"], True)
    verdict = judge(request, PLATFORM)
    response = answer(request, verdict.denials, ["one"])["response"]
    assert (response["uid"], response["allowed"], response["warnings"]) == ("7", False, ["one"])
    status = response["status"]
    assert (status["code"], status["reason"]) == (422, "Invalid")
    assert status["message"].startswith("2 mistakes:\n* spec.components[0].replicas: too small")
    assert (status["details"]["kind"], status["details"]["name"]) == (manifest["kind"], "chat")
    causes = {cause["field"] for cause in status["details"]["causes"]}
    assert causes == {"spec.components[0].replicas", "spec.components[0].type"}
    assert answer(request, (), ()) == {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {"uid": "7", "allowed": True},
    }


@pytest.mark.parametrize(
    "body",
    [None, [], {}, {"apiVersion": "admission.k8s.io/v1beta1", "request": {}},
     {"apiVersion": "admission.k8s.io/v1", "request": {"uid": "1"}},
     {"apiVersion": "admission.k8s.io/v1", "request": {"uid": "1", "kind": {}, "object": 3}}],
)  # fmt: skip
def test_what_is_no_review_is_refused(body: Any) -> None:
    with pytest.raises(Malformed, match="expected"):
        read_request(body)


def test_warnings_fit_what_the_api_server_passes_on() -> None:
    lines = shortened(["twice", "twice", "two\nlines", "x" * 300, *(f"w{i}" for i in range(20))])
    assert lines[:2] == ["twice", "two lines"]
    assert len(lines[2]) == 255
    assert len(lines) == 10
    assert lines[-1] == "and 14 more; `dynamo render` shows them all"
