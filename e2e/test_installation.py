"""The platform as people install it: its own images, its own rights, its own webhook.

Everything else in this folder runs an operator of this machine, which starts faster and shows more;
here the one that `dynamo operator manifests` describes has to do with what it was given.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from e2e.cluster import Cluster, KubectlError
from e2e.operator.space import Json, Space

ROOT = Path(__file__).parent.parent
SYSTEM = "dynamo-system"
OPERATOR, WEBHOOK = "dynamo-operator", "dynamo-operator-webhook"

OLDER: Json = {
    "apiVersion": "nvidia.com/v1alpha1",
    "kind": "DynamoGraphDeployment",
    "metadata": {"name": "older"},
    "spec": {
        "services": {
            "Frontend": {
                "componentType": "frontend",
                "replicas": 1,
                "extraPodSpec": {"mainContainer": {"image": "dynamo-platform/frontend"}},
            },
            "Worker": {
                "componentType": "worker",
                "replicas": 1,
                "resources": {"requests": {"cpu": "10m"}},
                "extraPodSpec": {
                    "mainContainer": {
                        "image": "nvcr.io/nvidia/ai-dynamo/vllm-runtime:1.6.1",
                        "command": ["python3", "-m", "dynamo.mocker"],
                        "args": ["--model-name", "tiny"],
                    }
                },
            },
        }
    },
}


def manifests() -> str:
    """What `dynamo operator manifests` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_cli.main", "operator", "manifests"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout


@pytest.fixture(scope="module")
def system(pods: Cluster) -> Iterator[Space]:
    """The namespace of an installation, which is gone afterwards."""
    text = manifests()
    space = Space(pods, SYSTEM)
    try:
        pods.kubectl("apply", "-f", "-", input=text)
        for name in (OPERATOR, WEBHOOK):
            space.until(
                lambda name=name: available(space, name) == 2,
                f"{name} available",
                180.0,
                lambda name=name: story(space, name),
            )
        yield space
    finally:
        pods.kubectl("delete", "-f", "-", "--ignore-not-found", input=text, timeout=180.0)
    left = pods.kubectl("get", "-f", "-", "--ignore-not-found", "-o", "name", input=text).stdout
    assert left == ""


@pytest.fixture
def space(system: Space) -> Iterator[Space]:
    space = Space(system.cluster, "installed")
    space.create()
    yield space
    space.delete()


def available(space: Space, deployment: str) -> int:
    status = space.get("deployment", deployment)["status"]
    return int(status.get("availableReplicas", 0))


def story(space: Space, deployment: str) -> str:
    return "\n".join(
        [
            space.kubectl("get", "pods", "-o", "wide", check=False),
            space.kubectl("logs", f"deploy/{deployment}", "--tail=40", check=False),
            space.kubectl("get", "events", check=False)[-3000:],
        ]
    )


def leader(system: Space) -> str:
    """The pod that holds the lease."""
    holder = system.get("lease", OPERATOR)["spec"].get("holderIdentity") or ""
    return str(holder.partition("_")[0])


@pytest.mark.timeout(420)
def test_an_installation_serves_both_versions_with_the_rights_it_was_given(
    system: Space, space: Space
) -> None:
    warned = space.cluster.kubectl(
        "-n", space.name, "apply", "-f", str(ROOT / "examples" / "quickstart.yaml")
    ).stderr
    assert "Warning" not in warned
    space.apply(OLDER)
    newer = space.get("dynamographdeployments.v1beta1.nvidia.com", "older")
    assert newer["apiVersion"] == "nvidia.com/v1beta1"
    assert [c["name"] for c in newer["spec"]["components"]] == ["Frontend", "Worker"]
    again = space.get("dynamographdeployments.v1alpha1.nvidia.com", "older")
    assert again["spec"] == OLDER["spec"]

    for name in ("quickstart", "older"):
        space.wait_ready(name, 180.0)
        client = openai.OpenAI(base_url=f"{space.url(name)}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8
        )
        assert answer.choices[0].message.content
    for pod in system.list("pods"):  # nothing was lacking
        log = system.kubectl("logs", pod["metadata"]["name"])
        assert "forbidden" not in log, log[-3000:]


@pytest.mark.timeout(240)
def test_what_can_never_run_is_refused_in_the_api_servers_words(
    system: Space, space: Space
) -> None:
    bad = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": "bad"},
        "spec": {
            "components": [
                {
                    "name": "Worker",
                    "type": "worker",
                    "podTemplate": {
                        "spec": {
                            "containers": [
                                {
                                    "name": "main",
                                    "image": "dynamo-platform/worker",
                                    "resources": {"limits": {"memory": "lots"}},
                                }
                            ]
                        }
                    },
                }
            ]
        },
    }
    with pytest.raises(KubectlError) as refused:
        space.apply(bad)
    assert "podTemplate.spec.containers[0].resources.limits" in str(refused.value)
    assert not space.exists("dgd", "bad")


@pytest.mark.timeout(300)
def test_the_standby_takes_over_and_restarts_nothing(system: Space, space: Space) -> None:
    space.cluster.kubectl(
        "-n", space.name, "apply", "-f", str(ROOT / "examples" / "quickstart.yaml")
    )
    space.wait_ready("quickstart", 180.0)
    before = {pod["metadata"]["uid"] for pod in space.pods("quickstart")}
    first = leader(system)
    system.kubectl("delete", "pod", first, "--grace-period=0", "--force")
    space.patch(
        "dgd",
        "quickstart",
        {"metadata": {"labels": {"seen-by": "the-next"}}},
    )
    components = space.get("dgd", "quickstart")["spec"]["components"]
    components[1]["replicas"] = 3
    space.patch("dgd", "quickstart", {"spec": {"components": components}})
    space.until(lambda: leader(system) not in ("", first), "another leader", 60.0)
    space.until(lambda: len(space.pods("quickstart", "Worker")) == 3, "three workers", 90.0)
    after = {pod["metadata"]["uid"] for pod in space.pods("quickstart")}
    assert after < before


@pytest.mark.timeout(240)
def test_everything_runs_with_the_least_rights(system: Space, space: Space) -> None:
    space.cluster.kubectl(
        "-n", space.name, "apply", "-f", str(ROOT / "examples" / "quickstart.yaml")
    )
    space.wait_ready("quickstart", 180.0)
    for pod in (*system.list("pods"), *space.pods("quickstart")):
        spec = pod["spec"]
        for container in spec["containers"]:
            rights = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
            assert rights["runAsNonRoot"], pod["metadata"]["name"]
            assert rights["readOnlyRootFilesystem"], pod["metadata"]["name"]
            assert rights["capabilities"] == {"drop": ["ALL"]}, pod["metadata"]["name"]

    def may(account: str, verb: str, what: str, namespace: str, sub: str = "") -> bool:
        done = space.cluster.kubectl(
            *("auth", "can-i", verb, what, f"--subresource={sub}", "-n", namespace),
            f"--as=system:serviceaccount:{account}",
            check=False,
        )
        return done.stdout.strip() == "yes"

    operator = f"{SYSTEM}:{OPERATOR}"
    assert may(operator, "patch", "deployments.apps", space.name)
    assert not may(operator, "get", "secrets", space.name)
    assert not may(operator, "get", "pods", space.name, "log")
    assert not may(operator, "create", "pods", space.name, "exec")
    webhook = f"{SYSTEM}:{WEBHOOK}"
    assert may(webhook, "create", "deployments.apps", space.name)  # as a dry run
    assert not may(webhook, "delete", "deployments.apps", space.name)
    assert not may(webhook, "get", "secrets", space.name)
