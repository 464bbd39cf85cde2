"""The manifests of an installation: golden bytes, rights that suffice and no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamo_cli.main import app
from dynamo_operator.install.manifests import manifests
from dynamo_operator.install.rights import CHILDREN, operator_rules, webhook_rules
from dynamo_operator.install.settings import Installation
from dynamo_operator.reconcile import gather
from dynamo_operator.render.text import to_yaml
from typer.testing import CliRunner

Json = dict[str, Any]

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "cluster-wide": Installation(image_tag="test"),
    "restricted": Installation(
        namespace="team-system", image_tag="test", watch_namespaces=("team-a", "team-b")
    ),
    "cert-manager": Installation(
        image_tag="test",
        image_prefix="registry.example/dynamo/",
        cert_manager=True,
        pull_secrets=("team-a",),
    ),
    "no-webhook": Installation(image_tag="test", webhook=False, replicas=1),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    path = GOLDEN / "install" / f"{name}.yaml"
    text = to_yaml(manifests(CASES[name]))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def roles(installation: Installation) -> Iterator[tuple[str, str, Json]]:
    """Kind and name of each role, with each of its rules."""
    for manifest in manifests(installation):
        if manifest["kind"] in ("Role", "ClusterRole"):
            for rule in manifest["rules"]:
                yield manifest["kind"], manifest["metadata"]["name"], rule


@pytest.mark.parametrize("name", CASES)
def test_no_secrets_logs_or_wildcards(name: str) -> None:
    for kind, role, rule in roles(CASES[name]):
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "pods/log" not in rule["resources"]
        assert not {"escalate", "bind", "impersonate", "deletecollection"} & set(rule["verbs"])
        if "secrets" in rule["resources"]:
            assert kind == "Role" or rule["verbs"] == ["create"], role
            by_name = bool(rule.get("resourceNames"))
            assert by_name or rule["verbs"] == ["create"] or role.endswith("-pull-secrets")
        if "customresourcedefinitions" in rule["resources"]:
            assert len(rule["resourceNames"]) == 2


def test_a_restricted_installation_has_rights_in_its_namespaces_only() -> None:
    for kind, _, rule in roles(CASES["restricted"]):
        if kind == "ClusterRole":
            assert rule["resourceNames"]
            assert set(rule["verbs"]) <= {"get", "patch"}
    cluster = [m for m in manifests(CASES["restricted"]) if "namespace" not in m["metadata"]]
    named = [m["metadata"]["name"] for m in cluster if m["kind"] != "Namespace"]
    assert all(name.endswith("-team-system") for name in named)
    everywhere = {m["metadata"]["name"] for m in manifests(CASES["cluster-wide"])}
    assert not everywhere & set(named)


def allowed(rules: list[Json], group: str, resource: str, verb: str) -> bool:
    return any(
        group in rule["apiGroups"]
        and resource in rule["resources"]
        and verb in rule["verbs"]
        and not rule.get("resourceNames")
        for rule in rules
    )


def test_the_operator_may_keep_every_kind_that_is_rendered() -> None:
    for kind in (*gather.CHILDREN, *gather.OPTIONAL_CHILDREN):
        for verb in ("get", "list", "watch", "create", "patch", "delete"):
            assert allowed(operator_rules(), kind.group, kind.plural, verb), kind.full_name
    assert len({(group, kind) for group, kinds in CHILDREN for kind in kinds}) == len(
        {*gather.CHILDREN, *gather.OPTIONAL_CHILDREN}
    )


def test_the_operator_has_every_right_that_graphs_are_granted() -> None:
    """Else Kubernetes would refuse the Role: nobody grants what he has not."""
    granted = 0
    for path in sorted(GOLDEN.glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            for rule in manifest.get("rules", []) if manifest["kind"] == "Role" else []:
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        for verb in rule["verbs"]:
                            granted += 1
                            assert allowed(operator_rules(), group, resource, verb), rule
    assert granted > 5


def test_the_webhook_may_create_what_it_tries_and_change_nothing() -> None:
    for rule in webhook_rules():
        assert rule["verbs"] == ["create"]


@pytest.mark.parametrize("name", ["cluster-wide", "restricted"])
def test_nobody_is_asked_about_what_is_being_deleted(name: str) -> None:
    """Foreground deletion ends by updates of the garbage collector's."""
    (hooks,) = [
        manifest["webhooks"]
        for manifest in manifests(CASES[name])
        if manifest["kind"] == "ValidatingWebhookConfiguration"
    ]
    for hook in hooks:
        assert all("DELETE" not in rule["operations"] for rule in hook["rules"])
        expressions = [condition["expression"] for condition in hook["matchConditions"]]
        assert expressions == ["!has(object.metadata.deletionTimestamp)"]


@pytest.mark.parametrize("name", CASES)
def test_pods_are_fit_for_a_restricted_namespace(name: str) -> None:
    workloads = [m for m in manifests(CASES[name]) if m["kind"] == "Deployment"]
    assert workloads
    for workload in workloads:
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        selector = workload["spec"]["selector"]["matchLabels"].items()
        assert selector <= workload["spec"]["template"]["metadata"]["labels"].items()
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
        # What belongs to a graph carries this; the operator must not take itself for one.
        labels = [
            workload["metadata"]["labels"],
            workload["spec"]["template"]["metadata"]["labels"],
        ]
        assert all("app.kubernetes.io/managed-by" not in each for each in labels)


@pytest.mark.parametrize("name", CASES)
def test_the_arguments_are_those_of_the_command(name: str) -> None:
    """What a pod is started with, the command line accepts."""
    for workload in manifests(CASES[name]):
        if workload["kind"] == "Deployment":
            (container,) = workload["spec"]["template"]["spec"]["containers"]
            result = CliRunner().invoke(app, [*container["args"], "--help"])
            assert result.exit_code == 0
            for option in container["args"]:
                if option.startswith("--"):
                    assert option in result.output


def test_the_command_prints_what_the_function_gives() -> None:
    arguments = ["operator", "manifests", "--image-tag", "test", "-n", "team-system"]
    arguments += ["--watch-namespace", "team-a", "--watch-namespace", "team-b"]
    result = CliRunner().invoke(app, arguments)
    assert result.output == to_yaml(manifests(CASES["restricted"]))
