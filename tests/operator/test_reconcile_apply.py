"""Carrying out a plan against an API server in memory: what is held back when something fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from dynamo_operator.reconcile.apply import Applier
from dynamo_operator.reconcile.gather import GraphIndex
from dynamo_operator.reconcile.planning import plan
from dynamo_operator.render import Platform
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient

from tests.operator.objects import graph_raw, observed
from tests.runtime.kube_api import KubeApi, failure, serving

Json = dict[str, Any]
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ROLES, BINDINGS = f"{RBAC}/roles", f"{RBAC}/rolebindings"
TWO_PICKERS = [
    {"name": "Frontend", "type": "frontend"},
    {"name": "Other", "type": "frontend"},
    {"name": "Worker", "type": "worker"},
]


@pytest.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with serving() as api:
        yield api


@pytest.fixture
async def applier(api: KubeApi) -> AsyncIterator[Applier]:
    async with KubernetesClient(Access(api.url), user_agent="test") as client:
        yield Applier(client, GraphIndex(lambda key, urgent: None))


async def refusals(applier: Applier) -> list[str]:
    """Objects that were refused when the graph was brought in order."""
    seen = observed(raw=graph_raw(TWO_PICKERS))
    applied = await applier.carry_out(seen, plan(seen, Platform()))
    return [refusal.object for refusal in applied.plan.refused]


def bound(api: KubeApi) -> set[str]:
    return {name for collection, _, name in api.objects if collection == BINDINGS}


async def test_roles_are_bound(api: KubeApi, applier: Applier) -> None:
    assert await refusals(applier) == []
    assert bound(api) == {"g-frontend", "g-other"}


async def test_a_role_that_is_not_ours_is_not_bound(api: KubeApi, applier: Applier) -> None:
    api.put(ROLES, {"metadata": {"name": "g-frontend", "namespace": "team-a"}, "kind": "Role"})
    assert await refusals(applier) == ["Role/g-frontend"]
    assert bound(api) == {"g-other"}


async def test_a_role_that_was_not_tried_is_not_bound(api: KubeApi, applier: Applier) -> None:
    """After a failure of the server the other Roles wait; who knows whose those names are?"""
    api.put(ROLES, {"metadata": {"name": "g-other", "namespace": "team-a"}, "kind": "Role"})

    async def interfere(request: web.Request) -> web.StreamResponse | None:
        if request.path.endswith("/roles/g-frontend"):
            return failure(500, "InternalError", "a webhook is away")
        return None

    api.interfere = interfere
    assert await refusals(applier) == ["Role/g-frontend"]
    assert bound(api) == set()
    api.interfere = None
    assert await refusals(applier) == ["Role/g-other"]
    assert bound(api) == {"g-frontend"}
