"""The secret of graphs with prefill and decode workers: who gets it, and that it is made once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from dynamo_operator.reconcile.apply import YOUNG, Applier
from dynamo_operator.reconcile.gather import GraphIndex
from dynamo_operator.reconcile.plan import Plan
from dynamo_operator.render import Platform, render_with_notes
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient

from tests.operator.conftest import Graph
from tests.operator.objects import CREATED, graph_raw, observed
from tests.runtime.kube_api import KubeApi, serving

Json = dict[str, Any]
SECRETS = "/api/v1/secrets"
BORN = datetime.fromisoformat(CREATED)


def component(name: str, env: list[Json] | None = None) -> Json:
    image = "dynamo-platform/frontend" if name == "frontend" else "dynamo-platform/worker"
    main = {"name": "main", "image": image, **({"env": env} if env else {})}
    return {
        "name": name,
        "type": name,
        "podTemplate": {"spec": {"containers": [main]}},
    }


def variables(rendered: Any) -> dict[str, Json]:
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
    source = {"name": "g-prefill-decode", "key": "secret", "optional": True}
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


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with serving() as api:
        yield api


SECRET: Json = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "g-prefill-decode", "namespace": "team-a"},
}


async def carry_out(applier: Applier, age: timedelta) -> int:
    seen = replace(observed(raw=graph_raw()), at=BORN + age)
    return (await applier.carry_out(seen, Plan(manifests=(SECRET,)))).writes


async def test_the_secret_is_made_once_and_never_read(api: KubeApi) -> None:
    key = (SECRETS, "team-a", "g-prefill-decode")
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        applier = Applier(client, GraphIndex(lambda key, urgent: None))
        assert await carry_out(applier, timedelta()) == 1
        made = api.objects[key]["stringData"]["secret"]
        assert len(made) == 64
        assert await carry_out(applier, timedelta()) == 0
        assert len(api.requests) == 1

        # Another operator finds it there, and leaves it as it is.
        other = Applier(client, GraphIndex(lambda key, urgent: None))
        assert await carry_out(other, 2 * YOUNG) == 0
        assert await carry_out(other, 2 * YOUNG) == 0
        assert len(api.requests) == 2
        assert api.objects[key]["stringData"]["secret"] == made
        assert {method for method, _ in api.requests} == {"POST"}


async def test_a_young_graph_does_not_rely_on_an_earlier_graphs_secret(api: KubeApi) -> None:
    api.put(SECRETS, SECRET)
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        applier = Applier(client, GraphIndex(lambda key, urgent: None))
        assert await carry_out(applier, timedelta()) == 0
        api.delete(SECRETS, "team-a", "g-prefill-decode")
        assert await carry_out(applier, timedelta(seconds=5)) == 1
