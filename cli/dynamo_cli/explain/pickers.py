"""Where the pickers (or planners) are, and asking all of them at once.

Each replica keeps the decisions that it made itself, so nobody knows which of them to ask. In a
cluster they are asked through the API server's proxy, which needs no route to the pod and no open
port: whoever may `get` `pods/proxy` may look.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
from dynamo_runtime.kubernetes import labels
from dynamo_runtime.kubernetes.access import NoCluster
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.kubernetes.resources import INFERENCE_POOLS, PODS, SERVICES

Json = dict[str, Any]

TIMEOUT_S = 10.0
STATUS_PORT = 9090
STATUS_PORTS = ("system", "metrics", "status")
"""Names that the port of a picker's status server has, in graphs and in other people's charts."""
PICKER_ROLES = ("frontend", "epp")
PLANNER_ROLES = ("planner",)


class NoAnswer(Exception):
    """A picker, or the way to it, is not there; the message is a sentence."""


class Picker(Protocol):
    """One replica."""

    name: str

    async def get(self, path: str, **params: str) -> Json:
        """The JSON at ``path`` of its status server. Raises ``NoAnswer``."""
        ...


@dataclass(slots=True)
class ReachablePicker:
    """A status server that can be reached from here."""

    name: str  # its URL
    session: aiohttp.ClientSession

    async def get(self, path: str, **params: str) -> Json:
        try:
            async with self.session.get(self.name.rstrip("/") + path, params=params) as answer:
                if answer.status != 200:
                    raise NoAnswer(f"it answered {answer.status}; is it the right status server?")
                decoded: Json = msgspec.json.decode(await answer.read())
                return decoded
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise NoAnswer(f"it can't be reached: {error or type(error).__name__}") from error


@dataclass(slots=True)
class PodPicker:
    """A pod that only the API server can reach."""

    name: str
    namespace: str
    port: int
    client: KubernetesClient

    async def get(self, path: str, **params: str) -> Json:
        proxy = PODS.path(self.namespace, f"{self.name}:{self.port}", "proxy")
        try:
            return await self.client.request(
                "GET", proxy + path, params=params, timeout_s=TIMEOUT_S
            )
        except ApiError as error:
            raise NoAnswer(
                refused(error, f"get pods/proxy in namespace {self.namespace}")
            ) from None


def refused(error: ApiError, right: str) -> str:
    """Why the API server gave no answer, and which right would help."""
    if error.status in (401, 403):
        return f"the API server does not allow it: {error.message}. Needed is the right to {right}"
    return str(error)


@asynccontextmanager
async def at_urls(urls: Sequence[str]) -> AsyncIterator[list[Picker]]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        yield [ReachablePicker(url, session) for url in urls]


@dataclass(frozen=True, slots=True)
class InCluster:
    """Whose pickers: a graph's, or those that an InferencePool names."""

    graph: str = ""
    pool: str = ""
    namespace: str = ""  # "": that of the kubeconfig's context, or of this pod
    context: str | None = None
    kubeconfig: Path | None = None
    roles: tuple[str, ...] = PICKER_ROLES  # component types of a graph's pods that are asked


@asynccontextmanager
async def in_cluster(wanted: InCluster) -> AsyncIterator[list[Picker]]:
    """The running replicas. Raises ``NoAnswer`` if there is none, or nobody who tells."""
    try:
        client = await KubernetesClient.from_environment(
            kubeconfig=wanted.kubeconfig, context=wanted.context, user_agent="dynamo-explain"
        )
    except NoCluster as error:
        raise NoAnswer(str(error)) from None
    async with client:
        namespace = wanted.namespace or client.namespace
        if wanted.pool:
            pods = await _pool_pods(client, namespace, wanted.pool)
            whose = f"InferencePool {wanted.pool}"
        else:
            pods = await _graph_pods(client, namespace, wanted.graph, wanted.roles)
            whose = f"graph {wanted.graph}"
        running = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Running"]
        if not running:
            who = _called(wanted.roles)
            raise NoAnswer(f"no {who} of {whose} runs in namespace {namespace}")
        yield [PodPicker(p["metadata"]["name"], namespace, status_port(p), client) for p in running]


def _called(roles: Sequence[str]) -> str:
    return "picker" if roles == PICKER_ROLES else roles[0]


async def _graph_pods(
    client: KubernetesClient, namespace: str, graph: str, roles: Sequence[str]
) -> list[Json]:
    pods = await _pods(client, namespace, f"{labels.GRAPH}={labels.graph_value(graph)}")
    return [pod for pod in pods if (pod["metadata"].get("labels") or {}).get(labels.ROLE) in roles]


async def _pool_pods(client: KubernetesClient, namespace: str, name: str) -> list[Json]:
    """The pods behind the Service that the pool names as its picker."""
    try:
        pool = await client.get(INFERENCE_POOLS.path(namespace, name))
        service = pool["spec"]["endpointPickerRef"]["name"]
        found = await client.get(SERVICES.path(namespace, service))
    except ApiError as error:
        right = f"get inferencepools and services in namespace {namespace}"
        raise NoAnswer(refused(error, right)) from None
    except KeyError as error:
        raise NoAnswer(f"InferencePool {name} names no picker: it has no {error}") from None
    selector = found["spec"].get("selector")
    if not selector:
        raise NoAnswer(f"Service {service}, the picker of {name}, selects no pods")
    return await _pods(client, namespace, ",".join(f"{k}={v}" for k, v in selector.items()))


async def _pods(client: KubernetesClient, namespace: str, selector: str) -> list[Json]:
    try:
        found = await client.get(PODS.path(namespace), labelSelector=selector)
    except ApiError as error:
        raise NoAnswer(refused(error, f"list pods in namespace {namespace}")) from None
    return list(found["items"])


def status_port(pod: Json) -> int:
    """Where a picker's pod has its status server."""
    ports = {
        port.get("name"): port["containerPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports") or ()
    }
    return next((int(ports[name]) for name in STATUS_PORTS if name in ports), STATUS_PORT)


def local_urls(roles: Sequence[str] = PICKER_ROLES) -> list[str]:
    """Status servers of the pods of ``roles`` that `dynamo up` runs: of the run that DYNAMO_URL
    names, or of the only one. Raises ``NoAnswer``."""
    from dynamo_cli.local.record import running_ups

    url = os.environ.get("DYNAMO_URL")
    ups = [up for up in running_ups() if url is None or up.url == url]
    found = {
        up.graph: [
            f"http://{pod.address}:{pod.status_port or STATUS_PORT}"
            for pod in up.pods
            if pod.role in roles
        ]
        for up in ups
    }
    found = {graph: urls for graph, urls in found.items() if urls}
    if len(found) != 1:
        runs = ", ".join(f"{graph} ({' '.join(urls)})" for graph, urls in found.items())
        who = _called(roles)
        what = f"running: {runs}" if runs else f"no {who} of a running `dynamo up` was found"
        raise NoAnswer(
            f"{what}; name the {who}'s status server with --url http://HOST:9090, "
            "or a graph in a cluster with --graph"
        )
    (urls,) = found.values()
    return urls


@dataclass(slots=True)
class Answers:
    """What the replicas said together."""

    decisions: list[Json] = field(default_factory=list)
    """The newest first; of several replicas each decision says in ``picker`` who made it."""
    silent: dict[str, str] = field(default_factory=dict)
    """Replica -> why it gave no answer."""


async def decisions(pickers: Sequence[Picker], **params: str) -> Answers:
    """Ask all of ``pickers`` for decisions; ``params`` as `/debug/decisions` has them."""
    answers = Answers()

    async def ask(picker: Picker) -> None:
        try:
            found = (await picker.get("/debug/decisions", **params))["decisions"]
        except NoAnswer as error:
            answers.silent[picker.name] = str(error)
            return
        for decision in found:
            if len(pickers) > 1:
                decision["picker"] = picker.name
            answers.decisions.append(decision)

    await asyncio.gather(*map(ask, pickers))
    answers.decisions.sort(key=lambda decision: float(decision["time"]), reverse=True)
    return answers
