"""The secret of graphs with prefill and decode workers: who gets it, and that it is made once."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dynamo_crds.v1beta1 import DynamoGraphDeployment
from dynamo_operator.reconcile.apply import Applier
from dynamo_operator.reconcile.gather import GraphIndex
from dynamo_operator.reconcile.plan import Plan
from dynamo_operator.render import Kept, Platform, Rendered, render_with_notes
from dynamo_operator.render.canonical import short_hash
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient

from tests.operator.conftest import Graph
from tests.operator.objects import graph_raw, observed, pod_waiting
from tests.operator.simulation import Namespace
from tests.runtime.kube_api import KubeApi, serving

Json = dict[str, Any]
SECRETS = "/api/v1/secrets"


def component(name: str, env: list[Json] | None = None) -> Json:
    image = "dynamo-platform/frontend" if name == "frontend" else "dynamo-platform/worker"
    main = {"name": "main", "image": image, **({"env": env} if env else {})}
    return {
        "name": name,
        "type": name,
        "podTemplate": {"spec": {"containers": [main]}},
    }


def variables(rendered: Rendered) -> dict[str, Json]:
    """Deployment's component -> where its pods have DYN_PD_SECRET from."""
    found = {}
    for manifest in rendered.manifests:
        if manifest["kind"] == "Deployment":
            main = manifest["spec"]["template"]["spec"]["containers"][0]
            for entry in main["env"]:
                if entry["name"].startswith("DYN_PD_SECRET"):
                    name = manifest["metadata"]["labels"]["nvidia.com/dynamo-component"]
                    found[name] = entry
    return found


def test_pickers_and_both_roles_share_a_secret(graph: Graph, platform: Platform) -> None:
    rendered = render_with_notes(
        graph(component("frontend"), component("prefill"), component("decode")), platform
    )
    secrets = [m for m in rendered.manifests if m["kind"] == "Secret"]
    assert [m["metadata"]["name"] for m in secrets] == ["g-prefill-decode"]
    assert secrets[0].keys() == {"apiVersion", "kind", "metadata", "type"}  # no content
    # Not optional: a pod that started without it could never pair.
    source = {"name": "g-prefill-decode", "key": "secret"}
    wanted = {"name": "DYN_PD_SECRET", "valueFrom": {"secretKeyRef": source}}
    assert variables(rendered) == dict.fromkeys(("frontend", "prefill", "decode"), wanted)


def test_other_graphs_have_none(graph: Graph, platform: Platform) -> None:
    rendered = render_with_notes(graph(component("frontend"), component("worker")), platform)
    assert not [m for m in rendered.manifests if m["kind"] == "Secret"]
    assert variables(rendered) == {}


def test_an_authors_own_secret_stays(graph: Graph, platform: Platform) -> None:
    own = {"name": "DYN_PD_SECRET_FILE", "value": "/run/mine"}
    rendered = render_with_notes(
        graph(component("frontend", [own]), component("prefill"), component("decode")), platform
    )
    assert variables(rendered)["frontend"] == own


def test_a_secret_that_nobody_reads_is_not_made(graph: Graph, platform: Platform) -> None:
    own = {"name": "DYN_PD_SECRET", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "k"}}}
    parts = [component(name, [own]) for name in ("frontend", "prefill", "decode")]
    assert secrets_of(render_with_notes(graph(*parts), platform)) == []


def of_uid(uid: str) -> DynamoGraphDeployment:
    raw = graph_raw([component(name) for name in ("frontend", "prefill", "decode")])
    raw["metadata"]["uid"] = uid
    return DynamoGraphDeployment.model_validate(raw)


def secrets_of(rendered: Rendered) -> list[str]:
    return [m["metadata"]["name"] for m in rendered.manifests if m["kind"] == "Secret"]


def test_a_graph_that_replaces_another_of_its_name_shares_nothing_with_it(
    platform: Platform,
) -> None:
    before = render_with_notes(of_uid("u1"), platform)
    after = render_with_notes(of_uid("u2"), platform)
    assert not set(secrets_of(before)) & set(secrets_of(after))
    for rendered in (before, after):
        read = {v["valueFrom"]["secretKeyRef"]["name"] for v in variables(rendered).values()}
        assert read == set(secrets_of(rendered))


def test_kept_templates_have_the_secret_that_they_name(platform: Platform) -> None:
    graph = of_uid("u1")
    before = render_with_notes(of_uid("u0"), platform)
    workers = {c.name: c.templates for c in before.components if c.kind == "worker"}
    rendered = render_with_notes(graph, platform, kept=Kept(before.worker_hash, workers))
    fresh = render_with_notes(graph, platform)
    assert secrets_of(rendered) == sorted([*secrets_of(before), *secrets_of(fresh)])


def test_workers_that_an_orphaning_deletion_left_run_on_with_theirs() -> None:
    """`kubectl delete --cascade=orphan` and apply: another uid, and no pod notices."""
    parts = [component(name) for name in ("frontend", "prefill", "decode")]
    world = Namespace({"components": parts})
    world.settle()
    before = dict(world.children)
    world.graph["metadata"]["uid"] = "another"
    for child in world.children.values():
        del child["metadata"]["ownerReferences"]
    world.settle()
    assert world.children.keys() == before.keys()
    for key, child in world.children.items():
        assert child["metadata"]["uid"] == before[key]["metadata"]["uid"]
        if key[0] == "Deployment":
            assert child["spec"]["template"] == before[key]["spec"]["template"]

    def edit(spec: Json) -> None:
        main = spec["components"][0]["podTemplate"]["spec"]["containers"][0]
        main["env"] = [{"name": "A", "value": "b"}]

    world.edit(edit)
    plan = world.settle()  # the frontend is rendered afresh, and pairs with those that were kept
    secrets = [m["metadata"]["name"] for m in plan.manifests if m["kind"] == "Secret"]
    assert secrets == [f"g-prefill-decode-{short_hash('graph')}"]
    for key, child in world.children.items():
        if key[0] == "Deployment":
            text = json.dumps(child["spec"]["template"])
            assert set(re.findall(r"g-prefill-decode[-\w]*", text)) == set(secrets)


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with serving() as api:
        yield api


NAME = f"g-prefill-decode-{short_hash(graph_raw()['metadata']['uid'])}"
SECRET: Json = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": NAME, "namespace": "team-a"},
}
KEY = (SECRETS, "team-a", NAME)


async def carry_out(applier: Applier, *pods: Json) -> int:
    seen = observed(raw=graph_raw(), pods=pods)
    return (await applier.carry_out(seen, Plan(manifests=(SECRET,)))).writes


async def test_the_secret_is_made_once_and_never_read(api: KubeApi) -> None:
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        applier = Applier(client, GraphIndex(lambda key, urgent: None))
        assert await carry_out(applier) == 1
        made = api.objects[KEY]["stringData"]["secret"]
        assert len(made) == 64
        assert await carry_out(applier) == 0
        assert len(api.requests) == 1

        # Another operator finds it there, asks no more, and leaves it as it is.
        other = Applier(client, GraphIndex(lambda key, urgent: None))
        assert await carry_out(other) == 0
        assert await carry_out(other) == 0
        assert len(api.requests) == 2
        assert api.objects[KEY]["stringData"]["secret"] == made
        assert {method for method, _ in api.requests} == {"POST"}


async def test_a_deleted_secret_comes_back_when_a_pod_waits_for_it(api: KubeApi) -> None:
    why = "CreateContainerConfigError"
    waits = pod_waiting("prefill", why, f'secret "{NAME}" not found')
    waits_for_another = pod_waiting("prefill", why, 'secret "hf-token" not found')
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        applier = Applier(client, GraphIndex(lambda key, urgent: None))
        await carry_out(applier)
        api.delete(SECRETS, "team-a", NAME)
        assert await carry_out(applier, waits_for_another) == 0
        assert KEY not in api.objects
        assert await carry_out(applier, waits) == 1
        made = api.objects[KEY]["stringData"]["secret"]
        assert await carry_out(applier, waits) == 0, "the kubelet has not looked again yet"
        assert api.objects[KEY]["stringData"]["secret"] == made
