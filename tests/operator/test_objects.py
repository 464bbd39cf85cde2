"""The objects around the pods: Deployments and generations, Services, rights, adapters, notes."""

import copy
import json
from typing import Any

import pytest
from dynamo_operator.render import Platform, Rendered, names, render, render_with_notes

WORKER = {"spec": {"containers": [{"name": "main", "image": "dynamo-platform/vllm:1"}]}}
HASH = "nvidia.com/dynamo-worker-hash"


def of_kind(rendered: Rendered, kind: str) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m for m in rendered.manifests if m["kind"] == kind}


def worker(name: str, type: str = "worker", **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": type, "podTemplate": copy.deepcopy(WORKER), **fields}


def hash_of(rendered: Rendered) -> str:
    deployment = next(iter(of_kind(rendered, "Deployment").values()))
    return str(deployment["spec"]["template"]["metadata"]["labels"][HASH])


def test_aggregated_workers_keep_a_plain_name_and_carry_the_hash(
    graph: Any, platform: Platform
) -> None:
    rendered = render_with_notes(graph(worker("Worker")), platform)
    [(name, deployment)] = of_kind(rendered, "Deployment").items()
    assert name == "g-worker"
    assert len(hash_of(rendered)) == 8
    assert HASH not in deployment["spec"]["selector"]["matchLabels"]


def test_prefill_and_decode_have_a_deployment_for_each_generation(
    graph: Any, platform: Platform
) -> None:
    rendered = render_with_notes(
        graph(
            worker("P", "prefill"), worker("D", "decode"), {"name": "Frontend", "type": "frontend"}
        ),
        platform,
    )
    found = hash_of(rendered)
    assert list(of_kind(rendered, "Deployment")) == [f"g-p-{found}", f"g-d-{found}", "g-frontend"]
    for name, deployment in of_kind(rendered, "Deployment").items():
        selector = deployment["spec"]["selector"]["matchLabels"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert selector.get(HASH) == (None if name == "g-frontend" else found)
    assert list(of_kind(rendered, "Service")) == ["g-p", "g-d", "g-frontend"]
    for service in of_kind(rendered, "Service").values():
        assert HASH not in service["spec"]["selector"]


def test_the_hash_ignores_replicas_and_order_but_no_template(
    graph: Any, platform: Platform
) -> None:
    parts = [worker("P", "prefill", replicas=1), worker("D", "decode")]
    base = hash_of(render_with_notes(graph(*parts), platform))
    more = [worker("P", "prefill", replicas=7), worker("D", "decode")]
    assert hash_of(render_with_notes(graph(*more), platform)) == base
    assert hash_of(render_with_notes(graph(*reversed(parts)), platform)) == base
    frontend = {"name": "F", "type": "frontend", "replicas": 2}
    assert hash_of(render_with_notes(graph(*parts, frontend), platform)) == base
    changed = copy.deepcopy(parts)
    changed[1]["podTemplate"]["spec"]["nodeSelector"] = {"a": "b"}
    assert hash_of(render_with_notes(graph(*changed), platform)) != base
    env = [{"name": "A", "value": "1"}]
    assert hash_of(render_with_notes(graph(*parts, env=env), platform)) != base


def test_every_selector_picks_its_own_pods_only(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(worker("A"), worker("B")), platform)
    pods = {
        name: d["spec"]["template"]["metadata"]["labels"]
        for name, d in of_kind(rendered, "Deployment").items()
    }
    for kind, selector_of in (
        ("Deployment", lambda m: m["spec"]["selector"]["matchLabels"]),
        ("Service", lambda m: m["spec"]["selector"]),
    ):
        for name, manifest in of_kind(rendered, kind).items():
            selector = selector_of(manifest)
            assert [n for n, labels in pods.items() if selector.items() <= labels.items()] == [name]


def test_a_picker_speaks_http2(graph: Any, platform: Platform) -> None:
    service = of_kind(render_with_notes(graph({"name": "Epp", "type": "epp"}), platform), "Service")
    ports = {port["name"]: port for port in service["g-epp"]["spec"]["ports"]}
    assert ports["grpc"]["port"] == 9002
    assert ports["grpc"]["appProtocol"] == "http2"


def test_rights_are_the_least_that_do(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(
        graph(
            {"name": "Frontend", "type": "frontend"},
            {"name": "Planner", "type": "planner"},
            worker("Worker", scalingAdapter={}),
            worker("Fixed"),
        ),
        platform,
    )
    assert list(of_kind(rendered, "ServiceAccount")) == ["g-frontend", "g-planner"]
    roles = of_kind(rendered, "Role")
    assert list(roles) == ["g-frontend", "g-planner"]
    watch = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    tell = {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}
    assert roles["g-frontend"]["rules"] == [watch, tell]
    [seen, rule] = roles["g-planner"]["rules"]
    assert seen == watch
    assert rule["resources"] == ["dynamographdeploymentscalingadapters/scale"]
    assert rule["resourceNames"] == ["g-worker"]
    for name, binding in of_kind(rendered, "RoleBinding").items():
        assert binding["roleRef"]["name"] == name
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": name, "namespace": "default"}
        ]


def test_a_planner_without_adapters_gets_no_rights(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph({"name": "P", "type": "planner"}), platform)
    assert of_kind(rendered, "Role") == {}
    assert "PlannerHasNothingToScale" in [note.reason for note in rendered.notes]


def test_the_authors_service_account_gets_the_rights(graph: Any, platform: Platform) -> None:
    template = {"spec": {"serviceAccountName": "mine"}}
    rendered = render_with_notes(
        graph({"name": "F", "type": "frontend", "podTemplate": template}), platform
    )
    assert of_kind(rendered, "ServiceAccount") == {}
    [binding] = of_kind(rendered, "RoleBinding").values()
    assert binding["subjects"][0]["name"] == "mine"


def test_an_adapter_is_seeded_with_the_graphs_replicas(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(worker("Worker", scalingAdapter={}, replicas=4)), platform)
    [adapter] = of_kind(rendered, "DynamoGraphDeploymentScalingAdapter").values()
    assert adapter["metadata"]["name"] == "g-worker"
    assert adapter["spec"] == {
        "replicas": 4,
        "dgdRef": {"name": "g", "componentName": "Worker"},
    }


def config_of(rendered: Rendered) -> dict[str, Any]:
    [deployment] = of_kind(rendered, "Deployment").values()
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    [config] = [volume["configMap"] for volume in volumes if volume["name"] == "epp-config"]
    return dict(config)


def test_the_pickers_configuration_is_mounted(graph: Any, platform: Platform) -> None:
    config = {"plugins": [{"type": "x"}], "schedulingProfiles": []}
    inline = {"name": "Epp", "type": "epp", "eppConfig": {"config": config}}
    rendered = render_with_notes(graph(inline), platform)
    [(name, config_map)] = of_kind(rendered, "ConfigMap").items()
    assert list(config_map["data"]) == ["config.yaml"]
    assert config_of(rendered) == {"name": name}
    referred = {**inline, "eppConfig": {"configMapRef": {"name": "mine", "key": "k"}}}
    rendered = render_with_notes(graph(referred), platform)
    assert of_kind(rendered, "ConfigMap") == {}
    assert config_of(rendered)["items"] == [{"key": "k", "path": "config.yaml"}]


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"minAvailable": 1, "replicas": 1}, "MinAvailableNotRendered"),
        ({"topologyConstraint": {"packDomain": "rack"}}, "TopologyConstraintNotRendered"),
        ({"experimental": {"gpuMemoryService": {}}}, "GpuMemoryServiceNotRendered"),
        ({"experimental": {"failover": {}}}, "FailoverNotRendered"),
        ({"experimental": {"checkpoint": {"enabled": True}}}, "CheckpointNotRendered"),
    ],
)
def test_what_is_not_rendered_is_said(
    graph: Any, platform: Platform, field: dict[str, Any], reason: str
) -> None:
    rendered = render_with_notes(graph(worker("W", **field), worker("Other")), platform)
    assert [(n.component, n.reason) for n in rendered.notes] == [("W", reason)]
    assert set(of_kind(rendered, "Deployment")) == {"g-w", "g-other"}


def test_what_the_graph_asks_in_vain_is_said(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(
        graph(
            worker("W"),
            priorityClassName="high",
            annotations={"nvidia.com/dynamo-discovery-backend": "etcd"},
        ),
        platform,
    )
    assert [note.reason for note in rendered.notes] == [
        "PriorityClassNotRendered",
        "DiscoveryBackendIgnored",
    ]


def test_long_names_stay_unique_and_within_kubernetes_limits(
    graph: Any, platform: Platform
) -> None:
    long = "x" * 62
    rendered = render_with_notes(
        graph(
            worker(f"{long}a", "prefill"), worker(f"{long}b", "decode"), name="graph." + "y" * 200
        ),
        platform,
    )
    kinds = [(m["kind"], m["metadata"]["name"]) for m in rendered.manifests]
    assert len(set(kinds)) == len(kinds)
    for manifest in rendered.manifests:
        assert len(manifest["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values())


def test_a_services_name_starts_with_a_letter(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(worker("W"), name="3b"), platform)
    assert list(of_kind(rendered, "Service")) == ["s-3b-w"]
    assert [note.reason for note in rendered.notes] == ["ServiceRenamed"]


def test_the_graphs_namespace_wins_over_the_platforms(graph: Any) -> None:
    described = graph(worker("W"))
    for namespace in ("here", "there"):
        described.metadata.namespace = None if namespace == "here" else namespace
        manifests = render(described, Platform(namespace="here"))
        assert {m["metadata"]["namespace"] for m in manifests} == {namespace}


def test_bounded_names_differ_where_the_whole_names_do() -> None:
    assert names.bounded("a" * 64) != names.bounded("a" * 65)
    assert len(names.bounded("a-" * 50)) <= 63


def test_a_planner_is_told_what_it_may_scale(graph: Any, platform: Platform) -> None:
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    template = {"spec": {"containers": [{"name": "main", **gpus}]}}
    rendered = render_with_notes(
        graph(
            {"name": "P", "type": "planner"},
            worker("Prefill", type="prefill", scalingAdapter={}, podTemplate=template),
            worker("Fixed"),
        ),
        platform,
    )
    (container,) = of_kind(rendered, "Deployment")["g-p"]["spec"]["template"]["spec"]["containers"]
    told = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert json.loads(told["DYN_PLANNER_COMPONENTS"]) == [
        {"name": "Prefill", "role": "prefill", "adapter": "g-prefill", "gpus": 2}
    ]
