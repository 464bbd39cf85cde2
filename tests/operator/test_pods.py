"""Pod templates: defaults, and the author's word over them."""

from collections.abc import Callable
from typing import Any

import pytest
from dynamo_operator.render import Platform, render_with_notes
from dynamo_operator.render.notes import DRAIN_EXCEEDS_GRACE, LABEL_RESERVED

View = Callable[..., Any]
OURS = {"image": "dynamo-platform/worker:1"}
ENGINE = {"image": "dynamo-platform/vllm:1"}


def probe(view: Any, kind: str) -> tuple[str, Any, int]:
    found = view.main[f"{kind}Probe"]
    seconds = found["periodSeconds"] * found["failureThreshold"]
    return found["httpGet"]["path"], found["httpGet"]["port"], seconds


def test_a_worker_under_our_launcher(one: View) -> None:
    view = one(OURS)
    assert view.ports == {"http": 8000, "system": 9090, "worker-stream": 5557}
    assert probe(view, "startup") == ("/live", "system", 7200)
    assert probe(view, "readiness")[:2] == ("/ready", "system")
    assert view.main["livenessProbe"]["failureThreshold"] >= 3
    assert view.main["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert view.pod["automountServiceAccountToken"] is False
    assert view.deployment["spec"]["progressDeadlineSeconds"] > 7200
    for name, value in {
        "DYN_HTTP_PORT": "8000",
        "DYN_SYSTEM_PORT": "9090",
        "DYN_STREAM_PORT": "5557",
        "DYN_NAMESPACE": "default-g",
        "DYN_COMPONENT": "c",
        "DYN_PARENT_DGD_K8S_NAME": "g",
        "DYN_PARENT_DGD_K8S_NAMESPACE": "default",
        "DYN_DISCOVERY_BACKEND": "kubernetes",
    }.items():
        assert view.env[name] == value
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in view.main["env"]
        if "valueFrom" in entry
    }
    assert fields == {
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_IP": "status.podIP",
        "POD_UID": "metadata.uid",
    }


def test_a_stock_engine_has_http_only(one: View) -> None:
    view = one({"image": "vllm/vllm-openai:v0.26.0"})
    assert view.ports == {"http": 8000}
    assert probe(view, "readiness")[:2] == ("/health", "http")
    assert "DYN_STREAM_PORT" not in view.env


def test_a_foreign_worker_gets_what_dynamos_workers_expect(one: View) -> None:
    view = one({"image": "x/y:1", "command": ["work"]})
    assert view.ports == {"system": 9090}
    assert probe(view, "readiness")[:2] == ("/health", "system")
    assert view.env["DYN_SYSTEM_ENABLED"] == "true"


def test_a_frontend(one: View) -> None:
    view = one({"image": "dynamo-platform/frontend:1"}, type="frontend")
    assert view.ports == {"http": 8000, "system": 9090}
    assert probe(view, "liveness")[:2] == ("/live", "http")
    assert probe(view, "readiness")[:2] == ("/health", "http")
    assert view.pod["serviceAccountName"] == "g-c"
    assert [volume["name"] for volume in view.pod["volumes"]] == ["dynamo-tmp"]


def test_a_picker(one: View) -> None:
    view = one({"image": "dynamo-platform/epp:1"}, type="epp")
    assert view.ports == {"grpc": 9002, "grpc-health": 9003, "system": 9090}
    assert view.main["readinessProbe"]["grpc"] == {"port": 9003}
    assert view.env["DYN_RULES_POOL"] == "g-pool"


def test_probes_are_replaced_whole(one: View) -> None:
    mine = {"tcpSocket": {"port": 1}}
    view = one({**OURS, "livenessProbe": mine})
    assert view.main["livenessProbe"] == mine
    assert probe(view, "readiness")[0] == "/ready"


def test_a_port_number_taken_by_the_author_keeps_their_name(one: View) -> None:
    view = one({**OURS, "ports": [{"containerPort": 9090, "name": "status"}]})
    assert view.ports == {"http": 8000, "worker-stream": 5557, "status": 9090}
    assert probe(view, "readiness")[1] == 9090
    [service] = view.objects("Service")
    assert service["spec"]["ports"][0]["targetPort"] == 9090


def test_a_port_name_taken_by_the_author_keeps_their_number(one: View) -> None:
    view = one({**OURS, "ports": [{"containerPort": 9999, "name": "system"}]})
    assert view.ports["system"] == 9999
    assert probe(view, "readiness")[1] == "system"


def test_a_port_in_the_authors_variables_is_the_containers(one: View) -> None:
    view = one({**OURS, "env": [{"name": "DYN_SYSTEM_PORT", "value": "7000"}]})
    assert view.ports["system"] == 7000
    assert view.env["DYN_SYSTEM_PORT"] == "7000"
    [service] = view.objects("Service")
    assert service["spec"]["ports"] == [
        {"name": "system", "port": 9090, "protocol": "TCP", "targetPort": "system"}
    ]


def test_two_servers_moved_to_one_number_are_one_port(one: View) -> None:
    view = one({**OURS, "env": [{"name": "DYN_HTTP_PORT", "value": "9090"}]})
    assert view.ports == {"http": 9090, "worker-stream": 5557}


@pytest.mark.parametrize(
    ("grace", "variable", "expected_grace", "drain"),
    [
        (None, None, 930, "900"),
        (100, None, 100, "70"),
        (20, None, 20, "5"),
        (None, "50", 80, "50"),
    ],
)
def test_the_grace_period_covers_the_drain(
    one: View, grace: int | None, variable: str | None, expected_grace: int, drain: str
) -> None:
    env = [{"name": "DYN_DRAIN_SECONDS", "value": variable}] if variable else []
    pod = {"terminationGracePeriodSeconds": grace} if grace else {}
    view = one({**OURS, "env": env}, pod=pod)
    assert view.pod["terminationGracePeriodSeconds"] == expected_grace
    assert view.env["DYN_DRAIN_SECONDS"] == drain
    assert view.reasons == []


def test_a_drain_that_the_grace_period_cuts_is_said(one: View) -> None:
    env = [{"name": "DYN_DRAIN_SECONDS", "value": "500"}]
    view = one({**OURS, "env": env}, pod={"terminationGracePeriodSeconds": 100})
    assert view.reasons == [DRAIN_EXCEEDS_GRACE]


@pytest.mark.parametrize(
    ("size", "limit"), [(None, "8Gi"), ("20Gi", "20Gi"), ("0", None), (0, None), ("0Gi", None)]
)
def test_shared_memory(one: View, size: str | int | None, limit: str | None) -> None:
    view = one(ENGINE, **({} if size is None else {"sharedMemorySize": size}))
    volumes = {v["name"]: v["emptyDir"] for v in view.pod.get("volumes", [])}
    expected = {} if limit is None else {"shared-memory": {"medium": "Memory", "sizeLimit": limit}}
    assert volumes == expected
    mounts = {m["mountPath"] for m in view.main.get("volumeMounts", [])}
    assert mounts == (set() if limit is None else {"/dev/shm"})


def test_the_authors_shared_memory_is_enough(one: View) -> None:
    mount = {"name": "dshm", "mountPath": "/dev/shm/"}
    volume = {"name": "dshm", "emptyDir": {"medium": "Memory"}}
    view = one({**ENGINE, "volumeMounts": [mount]}, pod={"volumes": [volume]})
    assert view.main["volumeMounts"] == [mount]
    assert view.pod["volumes"] == [volume]


def test_a_mount_without_volume_is_a_claim_of_its_name(one: View) -> None:
    mount = {"name": "models", "mountPath": "/models"}
    init = {"name": "i", "image": "x", "volumeMounts": [{"name": "data", "mountPath": "/d"}]}
    view = one({**OURS, "volumeMounts": [mount]}, pod={"initContainers": [init]})
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"]
        for v in view.pod["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert claims == {"models": "models", "data": "data"}


def test_the_compilation_cache(one: View) -> None:
    for main, path in (
        (ENGINE, "/var/cache/vllm"),
        ({"image": "vllm/vllm-openai:v1"}, "/root/.cache/vllm"),
    ):
        view = one(main, compilationCache={"pvcName": "kernels"})
        mount = {"name": "compilation-cache", "mountPath": path}
        assert mount in view.main["volumeMounts"]
        assert view.env["VLLM_CACHE_ROOT"] == path


def test_pod_fields_of_the_author_win(one: View) -> None:
    pod = {
        "securityContext": {"runAsUser": 7},
        "serviceAccountName": "mine",
        "automountServiceAccountToken": True,
        "hostNetwork": True,
        "imagePullSecrets": [{"name": "mine"}],
    }
    view = one(OURS, pod=pod)
    assert {key: view.pod[key] for key in pod} == pod


def test_pull_secrets_of_the_platform(graph: Any) -> None:
    platform = Platform(image_pull_secrets=("registry",))
    described = {"name": "c", "type": "worker"}
    manifests = render_with_notes(graph(described), platform).manifests
    [deployment] = [m for m in manifests if m["kind"] == "Deployment"]
    assert deployment["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_labels_by_which_pods_are_found_are_ours(one: View) -> None:
    labels = {"nvidia.com/dynamo-component": "other", "tier": "gold", "team": "b"}
    view = one(
        OURS,
        metadata={"labels": labels, "annotations": {"a": "pod"}},
        spec={"labels": {"team": "a", "x": "y"}, "annotations": {"a": "graph", "b": "graph"}},
    )
    found = view.template["metadata"]["labels"]
    assert found["nvidia.com/dynamo-component"] == "c"
    assert (found["tier"], found["team"], found["x"]) == ("gold", "b", "y")
    assert view.template["metadata"]["annotations"] == {"a": "pod", "b": "graph"}
    assert view.reasons == [LABEL_RESERVED]
    assert view.deployment["metadata"]["annotations"] == {"a": "graph", "b": "graph"}


def test_metrics_can_be_switched_off(one: View) -> None:
    label = "nvidia.com/metrics-enabled"
    assert one(OURS).template["metadata"]["labels"][label] == "true"
    off = one(OURS, spec={"annotations": {"nvidia.com/enable-metrics": "false"}})
    assert label not in off.template["metadata"]["labels"]


def test_the_shared_dynamo_namespace(one: View) -> None:
    assert one(OURS, globalDynamoNamespace=True).env["DYN_NAMESPACE"] == "dynamo"


def test_main_keeps_its_place_among_the_containers(graph: Any, platform: Platform) -> None:
    containers = [
        {"name": "a", "image": "x"},
        {"name": "main", **OURS},
        {"name": "b", "image": "x"},
    ]
    described = {"name": "c", "type": "worker", "podTemplate": {"spec": {"containers": containers}}}
    manifests = render_with_notes(graph(described), platform).manifests
    [deployment] = [m for m in manifests if m["kind"] == "Deployment"]
    rendered = deployment["spec"]["template"]["spec"]["containers"]
    assert [c["name"] for c in rendered] == ["a", "main", "b"]
    assert rendered[0] == containers[0]


def test_our_images_are_the_installations_own_in_every_container(one: View) -> None:
    bare = {"name": "model", "image": "dynamo-platform/vllm", "command": ["dynamo", "model"]}
    chosen = {"name": "old", "image": "dynamo-platform/vllm:0.0.1"}
    others = {"name": "other", "image": "example.test/dynamo-platform/vllm"}
    view = one(OURS, pod={"initContainers": [bare, chosen, others]})
    [own, *rest] = view.pod["initContainers"]
    assert own == {**bare, "image": "dynamo-platform/vllm:test"}
    assert rest == [chosen, others]
    assert bare["image"] == "dynamo-platform/vllm", "the graph's own data is not changed"
