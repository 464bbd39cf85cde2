"""Graphs do not notice each other: a broken one delays none, and one at rest costs nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dynamo_runtime.kubernetes import resources

from e2e.operator_control.graphs import Json, graph
from e2e.operator_control.plane import told
from e2e.operator_control.process import Operator
from e2e.operator_control.world import World, condition, until

HOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
BROKEN = 12
"""More than the operator has workers."""
SOON_S = 60.0
"""Far longer than a graph needs alone, also on a machine that does much else."""


def too_greedy(spec: Json) -> Json:
    """A pod template that the API server refuses: more is asked for than is allowed."""
    main = spec["components"][1]["podTemplate"]["spec"]["containers"][0]
    main["resources"] = {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}
    return spec


async def test_a_graph_at_rest_costs_no_request(
    world: World, namespace: str, operator: Operator
) -> None:
    async with world.namespace(f"{namespace}-busy") as busy:
        await world.apply(*(graph(f"g{number}", namespace) for number in range(5)))
        await world.apply(graph("restless", busy))
        await world.settled(namespace, *(f"g{number}" for number in range(5)))
        await world.quiet()
        mark = world.plane.mark()
        began = await operator.metrics()
        for replicas in (3, 1, 4, 2):

            def change(spec: Json, replicas: int = replicas) -> None:
                spec["components"][1]["replicas"] = replicas

            await world.edit(busy, "restless", change)
            await world.settled(busy, "restless")
        await world.patch(
            resources.GRAPHS, namespace, "g0", {"metadata": {"annotations": {"note": "mine"}}}
        )
        await world.quiet()
        for_them = [each for each in world.plane.requests(mark) if each.namespace == namespace]
        assert for_them == [], told(for_them)
        # Nor is anything read of the other: all is in the caches, but for what is yet to be made.
        reads = [
            each
            for each in world.plane.requests(mark)
            if each.verb in ("get", "list")
            and each.resource not in ("", "leases")
            and each.code != 404
        ]
        assert reads == [], told(reads)
        key = ("controller_runtime_reconcile_total", ("dynamographdeployment", "error"))
        assert (await operator.metrics()).get(key) == began.get(key)


async def test_a_refused_graph_says_why_and_delays_none(
    world: World, namespace: str, operator: Operator
) -> None:
    async with world.namespace(f"{namespace}-full") as full:
        quota = {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "none", "namespace": full},
            "spec": {"hard": {"count/deployments.apps": "0"}},
        }
        await world.api.request("POST", f"/api/v1/namespaces/{full}/resourcequotas", body=quota)
        broken = [graph(f"quota{number}", full) for number in range(BROKEN)]
        invalid = [graph(f"invalid{number}", namespace) for number in range(BROKEN)]
        for each in invalid:
            too_greedy(each["spec"])
        await world.apply(*broken, *invalid)
        await world.apply(graph("good", namespace))
        await world.settled(namespace, "good", timeout_s=SOON_S)

        async def is_told() -> bool:
            by_quota = condition(await world.graph(full, "quota0"), "Ready")
            by_value = condition(await world.graph(namespace, "invalid0"), "Ready")
            return "exceeded quota" in by_quota.get("message", "") and (
                "must be less than or equal to cpu limit" in by_value.get("message", "")
            )

        await until("reasons told", is_told)

        # They are tried less and less often, and what can run of them does.
        async def slows_down() -> bool:
            mark = world.plane.mark()
            await asyncio.sleep(3.0)
            tries = [
                each
                for each in world.plane.requests(mark)
                if each.resource == "deployments" and each.code in (403, 422)
            ]
            return len(tries) <= 2 * BROKEN

        await until("backed off", slows_down, 60.0)
        assert await world.find(resources.DEPLOYMENTS, namespace, "invalid0-frontend") is not None
        assert await operator.total("dynamo_operator_graphs_failing") >= 2 * BROKEN

        # A graph that is put right need not wait until its turn comes.
        def cure(spec: Json) -> None:
            spec["components"][1]["podTemplate"]["spec"]["containers"][0].pop("resources")

        await world.edit(namespace, "invalid0", cure)
        await world.settled(namespace, "invalid0", timeout_s=SOON_S)


@asynccontextmanager
async def hanging(world: World, namespace: str) -> AsyncIterator[None]:
    """Every write of the namespace's objects waits for a webhook that never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1000)  # connections come to stand and hear nothing
        hook = {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": namespace},
            "webhooks": [
                {
                    "name": "silent.example.com",
                    "admissionReviewVersions": ["v1"],
                    "sideEffects": "None",
                    "timeoutSeconds": 10,
                    "failurePolicy": "Fail",
                    "clientConfig": {"url": f"https://127.0.0.1:{server.getsockname()[1]}/"},
                    "namespaceSelector": {
                        "matchLabels": {"kubernetes.io/metadata.name": namespace}
                    },
                    "rules": [
                        {
                            "apiGroups": ["", "apps"],
                            "apiVersions": ["*"],
                            "operations": ["CREATE", "UPDATE"],
                            "resources": ["*"],
                        }
                    ],
                }
            ],
        }
        await world.api.request("POST", HOOKS, body=hook)
        try:
            yield
        finally:
            await world.api.delete(f"{HOOKS}/{namespace}")


async def test_a_namespace_whose_writes_hang_delays_no_other(
    world: World, namespace: str, operator: Operator
) -> None:
    async with world.namespace(f"{namespace}-dead") as dead:
        names = [f"stuck{number}" for number in range(BROKEN)]
        async with hanging(world, dead):
            await world.apply(*(graph(name, dead) for name in names))
            for number in range(3):
                began = time.monotonic()
                await world.apply(graph(f"good{number}", namespace))
                await world.settled(namespace, f"good{number}", timeout_s=SOON_S)
                print(f"settled after {time.monotonic() - began:.1f} s")
                await asyncio.sleep(5.0)  # on purpose: retries come and go
        await world.settled(dead, *names, timeout_s=120.0)
