"""The platform as people install it: its own images, its own rights, its own webhook.

Everything else in this folder runs an operator of this machine, which starts faster and shows more;
here the one that `dynamo operator manifests` describes has to do with what it was given.
"""

from __future__ import annotations

import openai
import pytest

from e2e.cluster import KubectlError
from e2e.operator.platform import OPERATOR, ROOT, SYSTEM, WEBHOOK, Platform
from e2e.operator.space import Json, Space

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


@pytest.mark.timeout(420)
def test_an_installation_serves_both_versions_with_the_rights_it_was_given(
    platform: Platform, installed_space: Space
) -> None:
    space, system = installed_space, platform.system
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
    platform: Platform, installed_space: Space
) -> None:
    space = installed_space
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
def test_the_standby_takes_over_and_restarts_nothing(
    platform: Platform, installed_space: Space
) -> None:
    space = installed_space
    space.cluster.kubectl(
        "-n", space.name, "apply", "-f", str(ROOT / "examples" / "quickstart.yaml")
    )
    space.wait_ready("quickstart", 180.0)
    before = {pod["metadata"]["uid"] for pod in space.pods("quickstart")}
    first = platform.leader()
    platform.kill_leader()
    space.patch(
        "dgd",
        "quickstart",
        {"metadata": {"labels": {"seen-by": "the-next"}}},
    )
    components = space.get("dgd", "quickstart")["spec"]["components"]
    components[1]["replicas"] = 3
    space.patch("dgd", "quickstart", {"spec": {"components": components}})
    space.until(lambda: platform.leader() not in ("", first), "another leader", 60.0)
    space.until(lambda: len(space.pods("quickstart", "Worker")) == 3, "three workers", 90.0)
    after = {pod["metadata"]["uid"] for pod in space.pods("quickstart")}
    assert after < before


@pytest.mark.timeout(240)
def test_everything_runs_with_the_least_rights(platform: Platform, installed_space: Space) -> None:
    space, system = installed_space, platform.system
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
