"""Endpoints from an InferencePool: what a Gateway sends requests to, chosen by people's own labels.

The pool names pods by labels and up to eight ports; each port of each pod is an endpoint of its own
(the ranks of a data-parallel engine). Nothing else is asked of a pod, so that any vLLM Deployment
can stand behind a picker; a pod that runs our launcher is known by the names of its ports.

Fields: ``inference.networking.k8s.io/v1``, InferencePool.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dynamo_runtime.discovery.kubernetes import KubernetesEndpointSource
from dynamo_runtime.endpoint import ROLES, Endpoint
from dynamo_runtime.kubernetes import labels
from dynamo_runtime.kubernetes.client import Json, KubernetesClient
from dynamo_runtime.kubernetes.informer import Informer
from dynamo_runtime.kubernetes.resources import INFERENCE_POOLS, Resource

log = logging.getLogger(__name__)

MOST_PORTS = 8
STREAM_PORT, HTTP_PORT, STATUS_PORT = "worker-stream", "http", "system"
"""Names of our launcher's ports; the first one tells its pods from stock ones."""
FOREIGN_ROLE = "llm-d.ai/role"
"""Where llm-d's charts say what a pod does: prefill, decode, and words for both."""
ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")
"""Annotations by which a pod has fewer ranks than its pool has ports; the first found counts."""


class InvalidPool(ValueError):
    """An InferencePool that can't be followed; the message names the field."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What a picker follows of an InferencePool's ``spec``."""

    selector: str  # label selector of its pods, as the API takes it
    ports: tuple[int, ...]  # in the pool's order: a port's position is its rank
    app_protocol: str = "http"
    failure_mode: str = "FailClose"  # what the Gateway does without this picker

    @classmethod
    def of(cls, pool: Json) -> PoolSpec:
        """Raises ``InvalidPool``."""
        spec: Any = pool.get("spec") or {}
        match_labels = (spec.get("selector") or {}).get("matchLabels") or {}
        if not match_labels:  # it would select every pod of the namespace
            raise InvalidPool("spec.selector.matchLabels is empty; it must name the pods' labels")
        numbers = [port.get("number") for port in spec.get("targetPorts") or ()]
        return cls(
            selector=",".join(f"{key}={value}" for key, value in sorted(match_labels.items())),
            ports=target_ports(numbers, "spec.targetPorts"),
            app_protocol=spec.get("appProtocol") or "http",
            failure_mode=(spec.get("endpointPickerRef") or {}).get("failureMode") or "FailClose",
        )


def target_ports(numbers: Sequence[object], field: str) -> tuple[int, ...]:
    """``numbers`` without repetitions. Raises ``InvalidPool`` that names ``field``."""
    ports = tuple(dict.fromkeys(number for number in numbers if isinstance(number, int)))
    if not 1 <= len(ports) <= MOST_PORTS or len(set(numbers)) != len(ports):
        raise InvalidPool(f"{field} is {list(numbers)}; it must be 1 to {MOST_PORTS} port numbers")
    for port in ports:
        if not 0 < port < 65536:
            raise InvalidPool(f"{field} has {port}; ports are from 1 to 65535")
    return ports


def endpoints_of(pod: Json, ports: Sequence[int]) -> Iterator[Endpoint]:
    """One endpoint for each of ``ports``; none for a pod that has no address, has ended, or runs no
    engine that takes requests (another component of a graph, a follower of a multi-node engine)."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    pod_labels = metadata.get("labels") or {}
    address, role = status.get("podIP"), pod_labels.get(labels.ROLE)
    if not address or status.get("phase") in ("Succeeded", "Failed"):
        return
    if (role is not None and role not in ROLES) or pod_labels.get(labels.GROUP_INDEX, "0") != "0":
        return
    if role is None:
        foreign = pod_labels.get(FOREIGN_ROLE)
        role = foreign if foreign in ("prefill", "decode") else "worker"
    named = _named_ports(pod)
    active = _active_ports(metadata.get("annotations") or {})
    ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in status.get("conditions") or ()
    )
    for rank, port in enumerate(ports):
        if active is not None and port not in active:
            continue
        launcher = STREAM_PORT in named and named.get(HTTP_PORT, port) == port
        yield Endpoint(
            name=metadata["name"] if len(ports) == 1 else f"{metadata['name']}-rank-{rank}",
            address=address,
            port=port,
            role=role,
            ready=ready,
            terminating="deletionTimestamp" in metadata,
            generation=pod_labels.get(labels.WORKER_HASH, ""),
            stream_port=named[STREAM_PORT] if launcher else None,
            status_port=named.get(STATUS_PORT) if launcher else None,
            rank=rank if len(ports) > 1 else None,
            labels=pod_labels,
        )


def _named_ports(pod: Json) -> dict[str, int]:
    """Named ports of the container that has a worker stream; empty for stock pods."""
    for container in (pod.get("spec") or {}).get("containers") or ():
        named = {
            port["name"]: port["containerPort"]
            for port in container.get("ports") or ()
            if "name" in port
        }
        if STREAM_PORT in named:
            return named
    return {}


def _active_ports(annotations: Json) -> frozenset[int] | None:
    """None: all."""
    for annotation in ACTIVE_PORTS:
        if annotation in annotations:
            texts = (text.strip() for text in str(annotations[annotation]).split(","))
            return frozenset(int(text) for text in texts if text.isdecimal())
    return None


def _cut(pod: Json) -> Json:
    """What ``endpoints_of`` looks at. The rest is large, and what changes in it is no change."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    kept = ("name", "namespace", "labels", "deletionTimestamp")
    annotations = metadata.get("annotations") or {}
    return {
        "metadata": {
            **{key: metadata[key] for key in kept if key in metadata},
            "annotations": {key: annotations[key] for key in ACTIVE_PORTS if key in annotations},
        },
        "spec": {
            "containers": [
                {"ports": container.get("ports")}
                for container in (pod.get("spec") or {}).get("containers") or ()
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


def selected_pods(
    client: KubernetesClient,
    namespace: str,
    selector: str,
    ports: Sequence[int],
    *,
    on_problem: Callable[[str], None] = lambda problem: None,
    rng: random.Random | None = None,
) -> KubernetesEndpointSource:
    """The endpoints of the pods that ``selector`` picks: a pool without the resource."""
    return KubernetesEndpointSource(
        client,
        namespace,
        selector,
        endpoints_of=partial(endpoints_of, ports=ports),
        cut=_cut,
        on_problem=on_problem,
        rng=rng,
    )


class InferencePoolSource:
    """The endpoints of the InferencePool ``name``, for as long as it is followed.

    ``on_pool`` is told what the pool says, each time that changes; ``on_absent`` why there is no
    pool to follow (gone, never there, not understood), and "" when there is one again. A pool that
    goes away leaves its last endpoints in force, and its pods are followed on: requests may be
    under way, and a pool that is replaced is gone for a moment. ``on_problem`` is as for
    ``KubernetesEndpointSource``.
    """

    def __init__(
        self,
        client: KubernetesClient,
        namespace: str,
        name: str,
        *,
        group: str = INFERENCE_POOLS.group,
        on_problem: Callable[[str], None] = lambda problem: None,
        on_absent: Callable[[str], None] = lambda reason: None,
        on_pool: Callable[[PoolSpec], None] = lambda spec: None,
        rng: random.Random | None = None,
    ) -> None:
        version = INFERENCE_POOLS.api_version.rpartition("/")[2]
        self._resource = Resource(f"{group}/{version}", "InferencePool", INFERENCE_POOLS.plural)
        self._client = client
        self._namespace = namespace
        self._name = name
        self._on_problem = on_problem
        self._on_absent = on_absent
        self._on_pool = on_pool
        self._rng = rng or random.Random()
        self._problems: dict[str, str] = {}  # kind -> why it can't be followed at the moment
        self._absent: str | None = None  # why there is no pool; None: not known yet

    async def snapshots(self) -> AsyncGenerator[tuple[Endpoint, ...]]:
        changed = asyncio.Event()
        informer = Informer(
            self._client,
            self._resource,
            namespace=self._namespace,
            field_selector=f"metadata.name={self._name}",
            transform=lambda pool: pool if pool["metadata"]["name"] == self._name else None,
            on_change=lambda old, new: changed.set(),
            on_problem=partial(self._tell_problem, "pool"),
            rng=self._rng,
            name=f"pool {self._name}",
        )
        running = asyncio.create_task(informer.run(), name="pool")
        pods: AsyncGenerator[tuple[Endpoint, ...]] | None = None
        upcoming: asyncio.Future[tuple[Endpoint, ...]] | None = None
        spec: PoolSpec | None = None
        try:
            await informer.synced.wait()
            while True:
                changed.clear()
                found = self._read(informer)
                if found is not None and found != spec:
                    self._on_pool(found)
                    if spec is None or (found.selector, found.ports) != (spec.selector, spec.ports):
                        await _end(upcoming, pods)
                        upcoming, pods = None, self._follow(found).snapshots()
                    spec = found
                if upcoming is None and pods is not None:
                    upcoming = asyncio.ensure_future(anext(pods))
                awaited = asyncio.create_task(changed.wait())
                try:
                    futures: list[asyncio.Future[Any]]
                    futures = [awaited] if upcoming is None else [awaited, upcoming]
                    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    awaited.cancel()
                if upcoming is not None and upcoming.done():
                    snapshot, upcoming = upcoming.result(), None
                    yield snapshot
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await _end(upcoming, pods)

    def _follow(self, spec: PoolSpec) -> KubernetesEndpointSource:
        return selected_pods(
            self._client,
            self._namespace,
            spec.selector,
            spec.ports,
            on_problem=partial(self._tell_problem, "pods"),
            rng=self._rng,
        )

    def _read(self, informer: Informer) -> PoolSpec | None:
        """What the pool says; None while it says nothing that can be followed."""
        where = f"InferencePool {self._namespace}/{self._name}"
        pool = informer.objects.get((self._namespace, self._name))
        spec, absent = None, ""
        if pool is None:
            absent = f"{where} does not exist ({self._resource.api_version})"
        else:
            try:
                spec = PoolSpec.of(pool)
            except InvalidPool as error:
                absent = f"{where}: {error}"
        if absent != self._absent:
            if absent:
                log.error("%s", absent)
            else:
                log.info("%s is there", where)
            self._absent = absent
            self._on_absent(absent)
        return spec

    def _tell_problem(self, kind: str, problem: str) -> None:
        if kind == "pool" and "404" in problem:
            problem += (
                f" (is {self._resource.full_name} installed? "
                "--endpoint-selector and --endpoint-target-ports need no InferencePool)"
            )
        self._problems[kind] = problem
        self._on_problem("; ".join(filter(None, self._problems.values())))


async def _end(
    upcoming: asyncio.Future[tuple[Endpoint, ...]] | None,
    pods: AsyncGenerator[tuple[Endpoint, ...]] | None,
) -> None:
    if upcoming is not None:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)
    if pods is not None:
        await pods.aclose()
