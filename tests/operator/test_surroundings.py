"""What protects, measures and supplies the pods: budgets, monitors, network policies, claims, model
Services, pull secrets, rights of containers."""

from collections.abc import Callable
from typing import Any

import pytest
from dynamo_crds.load import load_graphs
from dynamo_operator.render import Platform, Rendered, Scale, pullsecrets, render_with_notes

VLLM = {"spec": {"containers": [{"name": "main", "image": "dynamo-platform/vllm:1"}]}}
FRONTEND = {"name": "Frontend", "type": "frontend"}
View = Callable[..., Any]


def worker(name: str, type: str = "worker", **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": type, "podTemplate": VLLM, **fields}


def of_kind(rendered: Rendered, kind: str) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m for m in rendered.manifests if m["kind"] == kind}


# --- every object


def test_every_object_can_be_found(graph: Any, platform: Platform) -> None:
    name = "n" * 80
    rendered = render_with_notes(
        graph(
            {"name": "Epp", "type": "epp"},
            worker("W", replicas=2, scalingAdapter={}, modelRef={"name": "m"}, multinode={}),
            name=name,
            labels={"app.kubernetes.io/managed-by": "me"},
        ),
        platform,
    )
    marks = {
        (
            m["metadata"]["labels"]["app.kubernetes.io/managed-by"],
            m["metadata"]["labels"]["nvidia.com/dynamo-graph-deployment-name"],
        )
        for m in rendered.manifests
    }
    [(manager, label)] = marks
    assert manager == "dynamo-operator"
    assert len(label) <= 63


# --- budgets


@pytest.mark.parametrize(
    ("component", "scale", "expected"),
    [
        (worker("W", replicas=2), None, True),
        (worker("W", replicas=1), None, False),
        (worker("W", replicas=0), None, False),
        ({**FRONTEND, "name": "W", "replicas": 3}, None, True),
        ({"name": "W", "type": "planner", "replicas": 2}, None, False),
        (worker("W", replicas=1), Scale(4), True),
        (worker("W", replicas=1), Scale(None), True),
        (worker("W", replicas=4), Scale(1), False),
    ],
)
def test_a_budget_for_more_than_one_pod(
    graph: Any, platform: Platform, component: Any, scale: Scale | None, expected: bool
) -> None:
    scales = {"W": scale} if scale else {}
    rendered = render_with_notes(graph(component), platform, scale=scales)
    budgets = of_kind(rendered, "PodDisruptionBudget")
    assert bool(budgets) is expected
    for budget in budgets.values():
        assert budget["spec"]["maxUnavailable"] == 1


def test_a_budget_covers_every_generation(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(
        graph(worker("P", "prefill", replicas=2), worker("D", "decode")), platform
    )
    [budget] = of_kind(rendered, "PodDisruptionBudget").values()
    assert budget["spec"]["selector"]["matchLabels"] == {
        "nvidia.com/dynamo-graph-deployment-name": "g",
        "nvidia.com/dynamo-component": "P",
    }


# --- monitors


def test_a_monitor_scrapes_the_status_ports(graph: Any, platform: Platform) -> None:
    described = graph(FRONTEND, worker("W"), {"name": "P", "type": "planner"})
    [monitor] = of_kind(render_with_notes(described, platform), "PodMonitor").values()
    ports = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    assert ports == ["system", "metrics"]


@pytest.mark.parametrize(
    ("setting", "served", "monitors", "reasons"),
    [
        (None, True, 1, []),
        (None, False, 0, []),
        ("true", False, 0, ["PodMonitorNotServed"]),
        ("false", True, 0, []),
    ],
)
def test_metrics_that_nobody_reads(
    graph: Any, setting: str | None, served: bool, monitors: int, reasons: list[str]
) -> None:
    platform = Platform(apis=None if served else frozenset())
    described = graph(worker("W"))
    described.metadata.annotations = {"nvidia.com/enable-metrics": setting} if setting else {}
    rendered = render_with_notes(described, platform)
    assert len(of_kind(rendered, "PodMonitor")) == monitors
    assert [n.reason for n in rendered.notes] == reasons


# --- network policies


def admitted(policy: dict[str, Any], labels: dict[str, str], port: int) -> bool:
    """Whether a pod of the same namespace with `labels` may connect to `port`."""

    def matches(selector: dict[str, Any]) -> bool:
        return selector.get("matchLabels", {}).items() <= labels.items() and all(
            labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
        )

    return any(
        ("from" not in rule or any(matches(peer["podSelector"]) for peer in rule["from"]))
        and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
        for rule in policy["spec"]["ingress"]
    )


def pod(role: str, graph: str = "g", component: str = "X") -> dict[str, str]:
    return {
        "nvidia.com/dynamo-graph-deployment-name": graph,
        "nvidia.com/dynamo-component": component,
        "nvidia.com/dynamo-component-type": role,
    }


def test_only_pickers_of_the_graph_reach_an_engine(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(FRONTEND, worker("W")), platform)
    [policy] = of_kind(rendered, "NetworkPolicy").values()
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for port in (8000, 5557):
        assert admitted(policy, pod("frontend"), port)
        assert admitted(policy, pod("planner"), port)
        assert not admitted(policy, pod("frontend", "other"), port)
        assert not admitted(policy, pod("worker"), port)
        assert not admitted(policy, {}, port)
    assert admitted(policy, {}, 9090)


def test_prefill_and_decode_reach_each_other(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(
        graph(FRONTEND, worker("P", "prefill"), worker("D", "decode")), platform
    )
    policies = of_kind(rendered, "NetworkPolicy")
    assert set(policies) == {"g-p", "g-d"}
    for name, other, own in (("g-p", "decode", "prefill"), ("g-d", "prefill", "decode")):
        assert admitted(policies[name], pod(other), 5600)
        assert not admitted(policies[name], pod(other, "other"), 5600)
        assert not admitted(policies[name], pod(own), 5600)


def test_nodes_of_one_engine_reach_each_other(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(FRONTEND, worker("W", multinode={})), platform)
    [policy] = of_kind(rendered, "NetworkPolicy").values()
    assert admitted(policy, pod("worker", component="W"), 29500)
    assert not admitted(policy, pod("worker", component="V"), 29500)


def test_a_gateways_proxy_reaches_an_engines_requests_only(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph({"name": "Epp", "type": "epp"}, worker("W")), platform)
    [policy] = of_kind(rendered, "NetworkPolicy").values()
    assert admitted(policy, {}, 8000)
    assert not admitted(policy, {}, 5557)


def test_processes_of_dynamo_reach_each_other(graph: Any, platform: Platform) -> None:
    foreign = {"spec": {"containers": [{"name": "main", "image": "x/y", "command": ["run"]}]}}
    rendered = render_with_notes(graph(FRONTEND, {**worker("W"), "podTemplate": foreign}), platform)
    [policy] = of_kind(rendered, "NetworkPolicy").values()
    assert admitted(policy, pod("worker"), 40000)
    assert not admitted(policy, pod("worker", "other"), 40000)
    assert admitted(policy, {}, 19090)


def test_a_worker_for_all_graphs_admits_all_pickers(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(FRONTEND, worker("W", globalDynamoNamespace=True)), platform)
    [policy] = of_kind(rendered, "NetworkPolicy").values()
    assert admitted(policy, pod("frontend", "other"), 8000)
    assert not admitted(policy, pod("worker", "other"), 8000)


def test_policies_can_be_switched_off(graph: Any, platform: Platform) -> None:
    described = graph(FRONTEND, worker("W"))
    described.metadata.annotations = {"nvidia.com/network-policy": "false"}
    assert of_kind(render_with_notes(described, platform), "NetworkPolicy") == {}
    alone = render_with_notes(graph(worker("W")), platform)
    assert of_kind(alone, "NetworkPolicy") == {}


# --- claims and models


def test_claims_of_the_older_version_are_made(tmp_path: Any) -> None:
    file = tmp_path / "graph.yaml"
    file.write_text(
        "apiVersion: nvidia.com/v1alpha1\nkind: DynamoGraphDeployment\nmetadata: {name: g}\n"
        "spec:\n  pvcs:\n  - {name: models, create: true, storageClass: fast, size: 10Gi,"
        " volumeAccessMode: ReadWriteMany}\n  - {name: there}\n"
        "  services: {F: {componentType: frontend, ingress: {enabled: true}}}\n"
    )
    [older] = load_graphs(file)
    rendered = render_with_notes(older, Platform())
    [(name, claim)] = of_kind(rendered, "PersistentVolumeClaim").items()
    assert name == "models"
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "10Gi"}},
        "storageClassName": "fast",
    }
    assert "IngressNotRendered" in [note.reason for note in rendered.notes]


def test_a_models_workers_have_a_service(graph: Any, platform: Platform) -> None:
    model = {"name": "org/Model-1"}
    rendered = render_with_notes(
        graph(worker("A", modelRef=model), worker("B", modelRef=model), worker("C")), platform
    )
    services = [s for s in of_kind(rendered, "Service").values() if "clusterIP" in s["spec"]]
    [service] = services
    label = "nvidia.com/dynamo-base-model-hash"
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["annotations"]["nvidia.com/dynamo-base-model"] == "org/Model-1"
    assert service["metadata"]["labels"][label] == service["spec"]["selector"][label]
    assert [port["port"] for port in service["spec"]["ports"]] == [9090]
    chosen = [
        name
        for name, m in of_kind(rendered, "Deployment").items()
        if service["spec"]["selector"].items()
        <= m["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert chosen == ["g-a", "g-b"]


# --- pull secrets


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("nvcr.io/nvidia/x:1", "nvcr.io"),
        ("localhost/x", "localhost"),
        ("host:5000/x@sha256:00", "host:5000"),
        ("vllm/vllm-openai:v1", "docker.io"),
        ("busybox", "docker.io"),
        ("index.docker.io/a/b", "docker.io"),
    ],
)
def test_an_images_registry(image: str, registry: str) -> None:
    assert pullsecrets.registry(image) == registry


@pytest.mark.parametrize(
    ("server", "host"),
    [
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("https://NVCR.io", "nvcr.io"),
        ("host:5000/path", "host:5000"),
    ],
)
def test_a_docker_configurations_key(server: str, host: str) -> None:
    assert pullsecrets.host(server) == host


def test_pods_get_the_secrets_of_their_images(graph: Any) -> None:
    platform = Platform(
        image_pull_secrets=("always",),
        pull_secrets_by_registry={
            "nvcr.io": ("ngc", "always"),
            "https://index.docker.io/v1/": ("hub",),
            "elsewhere.example": ("other",),
        },
    )
    containers = [{"name": "main", "image": "nvcr.io/x/y:1"}, {"name": "l", "image": "logger"}]
    described = {"name": "c", "podTemplate": {"spec": {"containers": containers}}}

    def secrets(**metadata: Any) -> list[str]:
        found = graph({**described})
        found.metadata.annotations = metadata
        [deployment] = of_kind(render_with_notes(found, platform), "Deployment").values()
        return [s["name"] for s in deployment["spec"]["template"]["spec"]["imagePullSecrets"]]

    assert secrets() == ["always", "ngc", "hub"]
    off = {"nvidia.com/disable-image-pull-secret-discovery": "true"}
    assert secrets(**off) == ["always"]


# --- rights of containers


@pytest.mark.parametrize("image", ["frontend", "worker", "epp", "planner"])
def test_our_programs_write_to_tmp_only(one: View, image: str) -> None:
    view = one({"image": f"dynamo-platform/{image}:1"}, type=None)
    context = view.main["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["runAsNonRoot"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert view.env["HOME"] == "/tmp"
    assert {"name": "dynamo-tmp", "mountPath": "/tmp"} in view.main["volumeMounts"]
    assert {"name": "dynamo-tmp", "emptyDir": {}} in view.pod["volumes"]


def test_an_engine_keeps_its_writable_root(one: View) -> None:
    view = one({"image": "dynamo-platform/vllm:1"})
    assert "readOnlyRootFilesystem" not in view.main["securityContext"]
    assert view.main["securityContext"]["runAsNonRoot"] is True
    assert "HOME" not in view.env


def test_images_of_others_run_as_they_want(one: View) -> None:
    assert "securityContext" not in one({"image": "vllm/vllm-openai:v1"}).main


def test_the_authors_security_context_is_the_whole_one(one: View) -> None:
    mine = {"capabilities": {"add": ["IPC_LOCK"]}}
    view = one({"image": "dynamo-platform/vllm:1", "securityContext": mine})
    assert view.main["securityContext"] == mine
    root = one({"image": "dynamo-platform/vllm:1"}, pod={"securityContext": {"runAsUser": 0}})
    assert "runAsNonRoot" not in root.main["securityContext"]


def test_the_authors_tmp_is_enough(one: View) -> None:
    mount = {"name": "t", "mountPath": "/tmp"}
    view = one(
        {"image": "dynamo-platform/frontend:1", "volumeMounts": [mount]},
        type="frontend",
        pod={"volumes": [{"name": "t", "emptyDir": {}}]},
    )
    assert view.main["volumeMounts"] == [mount]
    assert [volume["name"] for volume in view.pod["volumes"]] == ["t"]


def test_pods_that_are_processes_have_no_root_of_their_own(graph: Any) -> None:
    rendered = render_with_notes(graph(FRONTEND), Platform(read_only_root=False))
    [deployment] = of_kind(rendered, "Deployment").values()
    spec = deployment["spec"]["template"]["spec"]
    assert "volumes" not in spec
    assert "readOnlyRootFilesystem" not in spec["containers"][0]["securityContext"]


# --- images


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("dynamo-platform/frontend", "reg.example/dynamo-platform/frontend:7"),
        ("dynamo-platform/frontend:1", "dynamo-platform/frontend:1"),
        ("x.example/dynamo-platform/frontend", "x.example/dynamo-platform/frontend"),
    ],
)
def test_our_images_without_registry_and_tag_are_this_installations(
    graph: Any, image: str, expected: str
) -> None:
    template = {"spec": {"containers": [{"name": "main", "image": image}]}}
    platform = Platform(own_prefix="reg.example/dynamo-platform/", image_tag="7")
    rendered = render_with_notes(graph({**FRONTEND, "podTemplate": template}), platform)
    [deployment] = of_kind(rendered, "Deployment").values()
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == expected
    assert rendered.notes == []
