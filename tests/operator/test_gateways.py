"""A graph behind a Gateway: pool and route; and what is said where either can't be."""

from typing import Any

import pytest
from dynamo_operator.render import Platform, Rendered, render_with_notes

EPP = {"name": "Epp", "type": "epp"}
FRONTEND = {"name": "Frontend", "type": "frontend"}
WORKER = {"name": "W", "type": "worker"}
GATEWAY = "nvidia.com/gateway"


def of_kind(rendered: Rendered, kind: str) -> list[dict[str, Any]]:
    return [m for m in rendered.manifests if m["kind"] == kind]


def behind(graph: Any, gateway: str) -> Any:
    graph.metadata.annotations = {GATEWAY: gateway}
    return graph


def test_a_pickers_pool_holds_the_graphs_workers(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(graph(EPP, WORKER), platform)
    [pool] = of_kind(rendered, "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["metadata"]["name"] == "g-pool"
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]
    picker = pool["spec"]["endpointPickerRef"]
    [service] = [s for s in of_kind(rendered, "Service") if s["metadata"]["name"] == "g-epp"]
    assert picker["name"] == service["metadata"]["name"]
    assert picker["port"]["number"] in [port["port"] for port in service["spec"]["ports"]]
    selector = pool["spec"]["selector"]["matchLabels"]
    chosen = [
        m["metadata"]["name"]
        for m in of_kind(rendered, "Deployment")
        if selector.items() <= m["spec"]["template"]["metadata"]["labels"].items()
    ]
    assert chosen == ["g-w"]
    assert of_kind(rendered, "HTTPRoute") == []


def on_port(name: str, port: int) -> dict[str, Any]:
    main = {"name": "main", "env": [{"name": "DYN_HTTP_PORT", "value": str(port)}]}
    return {**WORKER, "name": name, "podTemplate": {"spec": {"containers": [main]}}}


def on_named_port(name: str, port: int) -> dict[str, Any]:
    main = {"name": "main", "ports": [{"name": "http", "containerPort": port}]}
    return {**WORKER, "name": name, "podTemplate": {"spec": {"containers": [main]}}}


@pytest.mark.parametrize(
    ("workers", "ports", "told"),
    [
        ([on_port("W", 8080)], [8080], False),
        ([on_named_port("W", 8080)], [8080], False),
        ([on_port("W", 8080), on_named_port("V", 8080)], [8080], False),
        ([WORKER, on_port("V", 8080)], [8000, 8080], True),
        ([on_port(f"W{n}", 9000 + n) for n in range(9)], [9000 + n for n in range(8)], True),
        ([], [8000], False),
    ],
)
def test_pool_and_route_follow_the_ports_of_the_workers(
    graph: Any, platform: Platform, workers: Any, ports: list[int], told: bool
) -> None:
    rendered = render_with_notes(behind(graph(EPP, *workers), "entry"), platform)
    [pool] = of_kind(rendered, "InferencePool")
    assert pool["spec"]["targetPorts"] == [{"number": number} for number in ports]
    [route] = of_kind(rendered, "HTTPRoute")
    [rule] = route["spec"]["rules"]
    assert [backend["port"] for backend in rule["backendRefs"]] == ports[:1]
    said = [note.component for note in rendered.notes if note.reason == "InferencePoolPortsDiffer"]
    assert said == (["Epp"] if told else [])


def test_a_picker_may_read_what_people_say_of_its_pools_models(
    graph: Any, platform: Platform
) -> None:
    [role] = of_kind(render_with_notes(graph(EPP, WORKER), platform), "Role")
    allowed = {
        (group, resource): rule["verbs"]
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    read = ["get", "list", "watch"]
    assert allowed == {("", "pods"): read, ("", "events"): ["create"]} | {
        (group, kind): read
        for group in ("llm-d.ai", "inference.networking.x-k8s.io")
        for kind in ("inferenceobjectives", "inferencemodelrewrites")
    }


@pytest.mark.parametrize(
    ("components", "backend"),
    [
        ((EPP, WORKER), ("inference.networking.k8s.io", "InferencePool", "g-pool")),
        ((FRONTEND, WORKER), ("", "Service", "g-frontend")),
    ],
)
def test_a_route_leads_to_what_picks(
    graph: Any, platform: Platform, components: Any, backend: tuple[str, str, str]
) -> None:
    rendered = render_with_notes(behind(graph(*components), "shared/entry"), platform)
    [route] = of_kind(rendered, "HTTPRoute")
    assert route["metadata"]["name"] == "g-route"
    [parent] = route["spec"]["parentRefs"]
    assert (parent["kind"], parent["namespace"], parent["name"]) == ("Gateway", "shared", "entry")
    [rule] = route["spec"]["rules"]
    [found] = rule["backendRefs"]
    assert (found["group"], found["kind"], found["name"]) == backend
    assert found["port"] == 8000
    assert {match["path"]["type"] for match in rule["matches"]} == {"Exact"}
    paths = {match["path"]["value"] for match in rule["matches"]}
    assert {"/v1/chat/completions", "/v1/models"} <= paths
    assert not {path for path in paths if "lora" in path or not path.startswith("/v1/")}


def test_a_gateway_of_the_graphs_own_namespace(graph: Any, platform: Platform) -> None:
    rendered = render_with_notes(behind(graph(FRONTEND), "entry"), platform)
    [route] = of_kind(rendered, "HTTPRoute")
    [parent] = route["spec"]["parentRefs"]
    assert "namespace" not in parent


@pytest.mark.parametrize(
    ("components", "gateway", "apis", "reasons"),
    [
        ((EPP,), "", [], ["InferencePoolNotServed"]),
        ((FRONTEND,), "entry", [], ["HTTPRouteNotServed"]),
        ((EPP,), "entry", ["gateway.networking.k8s.io/HTTPRoute"],
         ["InferencePoolNotServed", "GatewayHasNothingToRouteTo"]),
        ((WORKER,), "entry", None, ["GatewayHasNothingToRouteTo"]),
        ((FRONTEND,), "a/b/c", None, ["GatewayUnreadable"]),
        ((FRONTEND,), "/b", None, ["GatewayUnreadable"]),
        ((FRONTEND,), "a/", None, ["GatewayUnreadable"]),
    ],
)  # fmt: skip
def test_what_can_not_be_is_said(
    graph: Any, components: Any, gateway: str, apis: list[str] | None, reasons: list[str]
) -> None:
    platform = Platform(apis=None if apis is None else frozenset(apis))
    rendered = render_with_notes(behind(graph(*components), gateway), platform)
    assert of_kind(rendered, "HTTPRoute") == []
    said = [n.reason for n in rendered.notes]
    assert [r for r in said if "Gateway" in r or r.endswith("Served")] == reasons
