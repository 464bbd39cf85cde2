"""Endpoints from the API server: a watch on a graph's worker pods.

Pods and not EndpointSlices: a picker connects to a pod as soon as it has an address, long before
it is ready, and wants its labels and ports by name.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncGenerator, Callable, Iterable

from dynamo_runtime.discovery.source import problem_of
from dynamo_runtime.endpoint import ROLES, Endpoint
from dynamo_runtime.kubernetes import labels
from dynamo_runtime.kubernetes.client import Json, KubernetesClient
from dynamo_runtime.kubernetes.informer import Informer
from dynamo_runtime.kubernetes.resources import PODS

log = logging.getLogger(__name__)

COALESCE_S = 0.05
"""Changes come in bursts (a rollout, a list after an outage): so long they are gathered."""
MAIN = "main"
"""Name of the container that holds the engine, in every graph."""


def endpoint_of(pod: Json) -> Endpoint | None:
    """The endpoint that ``pod`` is; None if it is none (any more, or yet).

    That is a pod without address, one that has ended, one whose container ``main`` has no port
    ``http``, and a follower in an engine that spans several pods.
    """
    metadata, status = pod["metadata"], pod.get("status") or {}
    pod_labels = metadata.get("labels") or {}
    address, role = status.get("podIP"), pod_labels.get(labels.ROLE)
    if not address or role not in ROLES or status.get("phase") in ("Succeeded", "Failed"):
        return None
    if pod_labels.get(labels.GROUP_INDEX, "0") != "0":
        return None
    ports = _ports(pod)
    if "http" not in ports:
        return None
    return Endpoint(
        name=metadata["name"],
        address=address,
        port=ports["http"],
        role=role,
        ready=any(
            condition.get("type") == "Ready" and condition.get("status") == "True"
            for condition in status.get("conditions") or ()
        ),
        terminating="deletionTimestamp" in metadata,
        generation=pod_labels.get(labels.WORKER_HASH, ""),
        stream_port=ports.get("worker-stream"),
        status_port=ports.get("system"),
        labels=pod_labels,
    )


def _ports(pod: Json) -> dict[str, int]:
    """Named ports of the main container."""
    for container in (pod.get("spec") or {}).get("containers") or ():
        if container.get("name") == MAIN:
            return {
                port["name"]: port["containerPort"]
                for port in container.get("ports") or ()
                if "name" in port
            }
    return {}


def _cut(pod: Json) -> Json:
    """What ``endpoint_of`` looks at. The rest is large, and what changes in it is no change."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    kept = ("name", "namespace", "labels", "deletionTimestamp")
    return {
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "spec": {
            "containers": [
                {"name": MAIN, "ports": container.get("ports")}
                for container in (pod.get("spec") or {}).get("containers") or ()
                if container.get("name") == MAIN
            ]
        },
        "status": {
            "phase": status.get("phase"),
            "podIP": status.get("podIP"),
            "conditions": [
                {"type": "Ready", "status": condition.get("status")}
                for condition in status.get("conditions") or ()
                if condition.get("type") == "Ready"
            ],
        },
    }


def _graph_endpoints(pod: Json) -> Iterable[Endpoint]:
    endpoint = endpoint_of(pod)
    return () if endpoint is None else (endpoint,)


class KubernetesEndpointSource:
    """The pods of ``namespace`` that ``label_selector`` picks, as endpoints.

    ``endpoints_of`` gives the endpoints of a pod, of which it sees what ``cut`` leaves; by default
    pods are those of a graph. While the API server can't be asked, the last snapshot stays in
    force; ``on_problem`` is told why in a sentence, and "" when it can be asked again.
    """

    def __init__(
        self,
        client: KubernetesClient,
        namespace: str,
        label_selector: str,
        *,
        endpoints_of: Callable[[Json], Iterable[Endpoint]] = _graph_endpoints,
        cut: Callable[[Json], Json] = _cut,
        on_problem: Callable[[str], None] = lambda problem: None,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._endpoints_of = endpoints_of
        self._cut = cut
        self._namespace = namespace
        self._label_selector = label_selector
        self._on_problem = on_problem
        self._rng = rng or random.Random()
        self._refused: dict[str, str] = {}  # pod name -> what is wrong with it, said once

    async def snapshots(self) -> AsyncGenerator[tuple[Endpoint, ...]]:
        changed = asyncio.Event()
        informer = Informer(
            self._client,
            PODS,
            namespace=self._namespace,
            label_selector=self._label_selector,
            transform=self._cut,
            on_change=lambda old, new: changed.set(),
            on_problem=self._on_problem,
            rng=self._rng,
            name="endpoints",
        )
        running = asyncio.create_task(informer.run(), name="endpoints")
        last: tuple[Endpoint, ...] | None = None
        try:
            await informer.synced.wait()
            while True:
                changed.clear()
                current = self._snapshot(informer.objects.values())
                if current != last:
                    last = current
                    yield current
                await changed.wait()
                await asyncio.sleep(COALESCE_S)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _snapshot(self, pods: Iterable[Json]) -> tuple[Endpoint, ...]:
        found: list[Endpoint] = []
        refused: dict[str, str] = {}
        for endpoint in itertools.chain.from_iterable(map(self._endpoints_of, pods)):
            if problem := problem_of(endpoint):
                refused[endpoint.name] = problem
                if self._refused.get(endpoint.name) != problem:
                    log.error("pod %s is left out: %s", endpoint.name, problem)
            else:
                found.append(endpoint)
        self._refused = refused
        return tuple(sorted(found, key=lambda endpoint: endpoint.name))
