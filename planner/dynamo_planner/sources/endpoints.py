"""Which workers there are: the local runner's file, or a watch on the graph's pods."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

from dynamo_runtime.discovery import (
    Endpoint,
    EndpointSource,
    FileEndpointSource,
    KubernetesEndpointSource,
)
from dynamo_runtime.kubernetes import labels
from dynamo_runtime.kubernetes.access import NoCluster
from dynamo_runtime.kubernetes.client import KubernetesClient


class Misconfigured(ValueError):
    """Settings that can't work; the message says which and what would be right."""


def endpoint_source(
    backend: str,
    *,
    file: Path | None,
    graph: str,
    namespace: str,
    on_problem: Callable[[str], None],
) -> EndpointSource:
    """The source that ``backend`` (`DYN_DISCOVERY_BACKEND`) names. Raises ``Misconfigured``."""
    match backend:
        case "file":
            if file is None:
                raise Misconfigured("discovery backend file needs DYN_ENDPOINTS_FILE")
            return FileEndpointSource(file)
        case "kubernetes":
            if not graph:
                raise Misconfigured(
                    "no graph: DYN_PARENT_DGD_K8S_NAME must name the DynamoGraphDeployment"
                )
            return _GraphPods(graph, namespace, on_problem)
    raise Misconfigured(
        f"discovery backend {backend!r} is not available; set DYN_DISCOVERY_BACKEND to kubernetes, "
        "or to file with DYN_ENDPOINTS_FILE"
    )


class _GraphPods:
    """The graph's worker pods, with a client that lives as long as its snapshots are wanted."""

    def __init__(self, graph: str, namespace: str, on_problem: Callable[[str], None]) -> None:
        self._graph = graph
        self._namespace = namespace
        self._on_problem = on_problem

    async def snapshots(self) -> AsyncIterator[tuple[Endpoint, ...]]:
        try:
            client = await KubernetesClient.from_environment(user_agent="dynamo-planner")
        except NoCluster as error:
            self._on_problem(str(error))
            return  # whoever iterates asks again
        async with client:
            source = KubernetesEndpointSource(
                client,
                self._namespace or client.namespace,
                labels.workers_of(self._graph),
                on_problem=self._on_problem,
            )
            async with aclosing(source.snapshots()) as snapshots:
                async for snapshot in snapshots:
                    yield snapshot
