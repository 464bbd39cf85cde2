"""What others do to a graph's objects: put right, left alone, or told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from dynamo_runtime.kubernetes import resources

from e2e.operator_control.graphs import Json, component, graph
from e2e.operator_control.world import World, condition, until

pytestmark = pytest.mark.usefixtures("operator")

DEPLOYMENTS, SERVICES = resources.DEPLOYMENTS, resources.SERVICES
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
GRAPH_LABEL = "nvidia.com/dynamo-graph-deployment-name"


def unversioned(item: Json) -> Json:
    """An object without what every write changes."""
    metadata = {
        key: value
        for key, value in item["metadata"].items()
        if key not in ("resourceVersion", "generation", "managedFields")
    }
    metadata["annotations"] = {
        key: value
        for key, value in metadata.get("annotations", {}).items()
        if not key.startswith("deployment.kubernetes.io/")
    }
    return {**item, "metadata": metadata, "status": {}}


EDITS: list[tuple[resources.Resource, str, Json]] = [
    (DEPLOYMENTS, "g-worker", {"metadata": {"labels": {GRAPH_LABEL: "another"}}}),
    (DEPLOYMENTS, "g-worker", {"metadata": {"labels": {GRAPH_LABEL: None}}}),
    (DEPLOYMENTS, "g-worker", {"metadata": {"annotations": {"nvidia.com/dynamo-applied": "x"}}}),
    (DEPLOYMENTS, "g-frontend", {"spec": {"replicas": 5}}),
    (DEPLOYMENTS, "g-frontend", {"metadata": {"ownerReferences": []}}),
    (SERVICES, "g-worker", {"metadata": {"labels": {"app.kubernetes.io/managed-by": "me"}}}),
    (SERVICES, "g-frontend", {"spec": {"selector": {GRAPH_LABEL: "another"}}}),
    # A port renumbered: to a merge another port, whose name clashes with that of ours.
    (SERVICES, "g-frontend", {"spec": {"ports": [{"name": "http", "port": 81}]}}),
    (resources.ROLES, "g-frontend", {"rules": []}),
    (resources.ROLE_BINDINGS, "g-frontend", {"subjects": []}),
    (resources.NETWORK_POLICIES, "g-worker", {"spec": {"ingress": []}}),
]


async def test_what_is_rendered_is_put_right(world: World, namespace: str) -> None:
    await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    for resource, name, patch in EDITS:
        before = unversioned(await world.get(resource, namespace, name))
        changed = unversioned(await world.patch(resource, namespace, name, patch))
        assert changed != before, patch

        async def is_right(
            resource: resources.Resource = resource, name: str = name, before: Json = before
        ) -> bool:
            return unversioned(await world.get(resource, namespace, name)) == before

        await until(f"{name} after {patch}", is_right)
    await world.quiet(namespace)
    await world.settled(namespace, "g")


async def test_an_image_and_a_deleted_object_come_back(world: World, namespace: str) -> None:
    await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    children = await world.children(namespace)
    before = await world.get(DEPLOYMENTS, namespace, "g-frontend")

    image = {"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "other:1"}
    await world.api.json_patch(DEPLOYMENTS.path(namespace, "g-frontend"), [image])
    for child in children:
        if child["kind"] != "Deployment":
            await world.delete(resources.of(child), namespace, child["metadata"]["name"])

    async def is_right() -> bool:
        now = await world.children(namespace)
        frontend = await world.get(DEPLOYMENTS, namespace, "g-frontend")
        names = [[(c["kind"], c["metadata"]["name"]) for c in each] for each in (children, now)]
        return names[0] == names[1] and frontend["spec"] == before["spec"]

    await until("all objects again", is_right)
    await world.settled(namespace, "g")


async def test_fields_of_others_are_left_alone(world: World, namespace: str) -> None:
    await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    await world.quiet(namespace, 1.0)
    mark = world.plane.mark()
    head = {"apiVersion": "apps/v1", "kind": "Deployment"}
    meta = {"name": "g-worker", "namespace": namespace}
    sidecar = {"name": "mesh", "image": "mesh:1"}
    await world.apply(
        {
            **head,
            "metadata": {**meta, "annotations": {"team": "a"}, "labels": {"cost-centre": "7"}},
            "spec": {"template": {"spec": {"containers": [sidecar], "priorityClassName": ""}}},
        },
        manager="mesh-injector",
    )
    await world.settled(namespace, "g")
    await world.quiet(namespace)

    async def of_others() -> tuple[object, ...]:
        item = await world.get(DEPLOYMENTS, namespace, "g-worker")
        names = [each["name"] for each in item["spec"]["template"]["spec"]["containers"]]
        metadata = item["metadata"]
        return metadata["annotations"]["team"], metadata["labels"]["cost-centre"], sorted(names)

    assert await of_others() == ("a", "7", ["main", "mesh"])
    written = {request.resource for request in world.plane.writes(mark, namespace)}
    assert written <= {"dynamographdeployments/status", "events"}, "it fought"

    # They also survive a change of the graph that does change the object.
    def change(spec: Json) -> None:
        spec["components"][1]["podTemplate"]["spec"]["containers"][0]["args"] = ["--speed=3"]

    await world.edit(namespace, "g", change)
    await world.settled(namespace, "g")
    assert await of_others() == ("a", "7", ["main", "mesh"])


async def test_an_autoscaler_on_a_deployment_is_yielded_to(world: World, namespace: str) -> None:
    await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    manager = "kube-controller-manager"  # as a HorizontalPodAutoscaler writes
    for replicas in (4, 3):
        await world.scale(DEPLOYMENTS, namespace, "g-worker", replicas, manager)

        async def is_running(replicas: int = replicas) -> bool:
            found = await world.graph(namespace, "g")
            return found["status"]["components"]["Worker"]["readyReplicas"] == replicas

        await until(f"{replicas} workers", is_running)
        await world.quiet(namespace)
        live = await world.get(DEPLOYMENTS, namespace, "g-worker")
        assert live["spec"]["replicas"] == replicas
    found = await world.graph(namespace, "g")
    (scaling,) = [
        each
        for each in found["status"]["components"]["Worker"]["conditions"]
        if each["type"] == "ScalingActive"
    ]
    assert manager in scaling["message"]

    # A change of the template goes through and takes the number along.
    def change(spec: Json) -> None:
        spec["components"][1]["podTemplate"]["spec"]["containers"][0]["args"] = ["--speed=3"]

    await world.edit(namespace, "g", change)
    await world.settled(namespace, "g")
    assert (await world.get(DEPLOYMENTS, namespace, "g-worker"))["spec"]["replicas"] == 3

    # A person's number is drift.
    await world.patch(DEPLOYMENTS, namespace, "g-frontend", {"spec": {"replicas": 3}})

    async def is_right() -> bool:
        live = await world.get(DEPLOYMENTS, namespace, "g-frontend")
        return bool(live["spec"]["replicas"] == 1)

    await until("a person's number put right", is_right)


@asynccontextmanager
async def mutating(world: World, namespace: str, expression: str) -> AsyncIterator[None]:
    """All Deployments of the namespace are changed on their way in, as a webhook would: by a CEL
    expression that gives an `Object` to apply."""
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "resourceRules": [
                    {
                        "apiGroups": ["apps"],
                        "apiVersions": ["v1"],
                        "operations": ["CREATE", "UPDATE"],
                        "resources": ["deployments"],
                    }
                ],
            },
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [
                {
                    "patchType": "ApplyConfiguration",
                    "applyConfiguration": {"expression": expression},
                }
            ],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": namespace},
        "spec": {"policyName": namespace},
    }
    await world.api.request("POST", f"{ADMISSION}/mutatingadmissionpolicies", body=policy)
    await world.api.request("POST", f"{ADMISSION}/mutatingadmissionpolicybindings", body=binding)

    async def is_in_force() -> bool:
        probe = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "probe", "namespace": namespace},
            "spec": {
                "selector": {"matchLabels": {"a": "b"}},
                "template": {
                    "metadata": {"labels": {"a": "b"}},
                    "spec": {"containers": [{"name": "main", "image": "a"}]},
                },
            },
        }
        made = await world.api.create(probe, dry_run=True)
        containers = made["spec"]["template"]["spec"]["containers"]
        return len(containers) > 1 or containers[0]["image"] != "a"

    try:
        await until("policy in force", is_in_force)
        yield
    finally:
        await world.api.delete(f"{ADMISSION}/mutatingadmissionpolicybindings/{namespace}")
        await world.api.delete(f"{ADMISSION}/mutatingadmissionpolicies/{namespace}")


async def test_a_sidecar_injected_on_the_way_in_stays(world: World, namespace: str) -> None:
    expression = """
        Object{spec: Object.spec{template: Object.spec.template{spec: Object.spec.template.spec{
          containers: [Object.spec.template.spec.containers{name: "mesh", image: "mesh:1"}]}}}}
    """
    async with mutating(world, namespace, expression):
        await world.apply(graph("g", namespace))
        await world.settled(namespace, "g")
        await world.quiet(namespace)
        live = await world.get(DEPLOYMENTS, namespace, "g-worker")
        names = [each["name"] for each in live["spec"]["template"]["spec"]["containers"]]
        assert sorted(names) == ["main", "mesh"]


async def test_a_webhook_that_insists_is_not_fought(world: World, namespace: str) -> None:
    """It overwrites what is rendered, each time: the two would never rest."""
    expression = """
        Object{spec: Object.spec{template: Object.spec.template{spec: Object.spec.template.spec{
          containers: [Object.spec.template.spec.containers{
            name: "main", image: "mirror.example/" +
              object.spec.template.spec.containers.filter(c, c.name == "main")[0].image
                .replace("mirror.example/", "")}]}}}}
    """
    async with mutating(world, namespace, expression):
        await world.apply(graph("g", namespace))
        await world.settled(namespace, "g")
        await world.quiet(namespace)
        live = await world.get(DEPLOYMENTS, namespace, "g-worker")
        (main,) = live["spec"]["template"]["spec"]["containers"]
        assert main["image"].startswith("mirror.example/")


async def test_what_is_not_rendered_any_more_is_removed(world: World, namespace: str) -> None:
    await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    before = await world.children(namespace)
    bystander = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "bystander",
            "namespace": namespace,
            "labels": {
                GRAPH_LABEL: "g",
                "app.kubernetes.io/managed-by": "dynamo-operator",
            },
        },
        "spec": {"ports": [{"port": 80}]},
    }
    await world.apply(bystander)  # has the labels, and another owner: nobody
    extra = component("Extra", "worker", main={"args": ["--served-model-name=other"]})
    await world.edit(namespace, "g", lambda spec: spec["components"].append(extra))
    await world.settled(namespace, "g")
    names = {child["metadata"]["name"] for child in await world.children(namespace)}
    assert "g-extra" in names

    await world.edit(namespace, "g", lambda spec: spec["components"].pop())
    await world.settled(namespace, "g")

    async def is_removed() -> bool:
        now = {(c["kind"], c["metadata"]["name"]) for c in await world.children(namespace)}
        wanted = {(c["kind"], c["metadata"]["name"]) for c in before}
        return {each for each in now if each[0] != "ControllerRevision"} == {
            each for each in wanted if each[0] != "ControllerRevision"
        }

    await until("superfluous objects gone", is_removed)
    assert await world.find(SERVICES, namespace, "bystander") is not None


@pytest.mark.parametrize("labelled", [False, True])
async def test_an_object_of_somebody_else_is_never_taken_over(
    world: World, namespace: str, labelled: bool
) -> None:
    labels = {GRAPH_LABEL: "g", "app.kubernetes.io/managed-by": "dynamo-operator"}
    theirs = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "g-worker",
            "namespace": namespace,
            "labels": labels if labelled else {},
        },
        "spec": {"ports": [{"port": 1234}], "selector": {"app": "theirs"}},
    }
    (before,) = await world.apply(theirs)
    await world.apply(graph("g", namespace))

    async def is_told() -> Json | None:
        found = await world.graph(namespace, "g")
        ready = condition(found, "Ready")
        return ready if "g-worker exists and does not belong" in ready.get("message", "") else None

    ready = await until("condition", is_told)
    assert ready["status"] == "False"
    assert "Service" in ready["message"]

    async def is_in_an_event() -> bool:
        events = await world.events(namespace, "g")
        return any("g-worker exists" in e["message"] and e["type"] == "Warning" for e in events)

    await until("event", is_in_an_event)
    assert await world.get(SERVICES, namespace, "g-worker") == before
    # Everything else of the graph is there, and whoever owns the Service can remove it.
    assert await world.find(DEPLOYMENTS, namespace, "g-worker") is not None
    await world.delete(SERVICES, namespace, "g-worker")
    await world.settled(namespace, "g")
    events = await world.events(namespace, "g")
    assert len([e for e in events if "g-worker exists" in e["message"]]) == 1, "told once"


async def test_what_an_orphaning_deletion_left_is_found_again(world: World, namespace: str) -> None:
    """`kubectl delete --cascade=orphan` and apply: no pod notices."""
    await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    before = {child["metadata"]["uid"] for child in await world.children(namespace)}
    path = resources.GRAPHS.path(namespace, "g")
    await world.api.delete(path, propagation="Orphan")

    async def is_gone() -> bool:
        return await world.find(resources.GRAPHS, namespace, "g") is None

    await until("graph gone", is_gone)
    assert await world.children(namespace) == []
    await world.apply(graph("g", namespace))
    await world.settled(namespace, "g")
    assert {child["metadata"]["uid"] for child in await world.children(namespace)} == before
