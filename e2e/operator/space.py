"""One namespace of the cluster as a test sees it: kubectl in, objects out, waiting for facts."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from e2e.cluster import Cluster, KubectlError
from e2e.cluster.tunnel import Tunnel

Json = dict[str, Any]
T = TypeVar("T")

GRAPH_LABEL = "nvidia.com/dynamo-graph-deployment-name"
COMPONENT_LABEL = "nvidia.com/dynamo-component"
HASH_LABEL = "nvidia.com/dynamo-worker-hash"
IMAGE_PREFIX = os.environ.get("E2E_IMAGE_PREFIX", "")
"""Where a cluster that isn't ours pulls the platform's images from; "" for a node's own images."""
POLL_S = 0.25
START_S = 120.0
"""For pods to come up while this machine does much else."""


class Late(AssertionError):
    """What was awaited did not come; says what there was instead."""


class Space:
    """A namespace. All names below are of objects in it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self._tunnels: dict[tuple[str, int], Tunnel] = {}

    # --- kubectl

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True, timeout: float = 120.0
    ) -> str:
        """What kubectl prints. Raises `KubectlError` with what it complains of."""
        done = self.cluster.kubectl(
            "-n", self.name, *arguments, input=input, check=check, timeout=timeout
        )
        return done.stdout

    def apply(self, *manifests: Json) -> str:
        """`kubectl apply` of manifests; its warnings."""
        whole = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        done = self.cluster.kubectl("-n", self.name, "apply", "-f", "-", input=json.dumps(whole))
        return done.stderr

    def get(self, kind: str, name: str) -> Json:
        found: Json = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found

    def list(self, kind: str, selector: str = "") -> list[Json]:
        """All objects of a kind, those of a label selector."""
        options = ("-l", selector) if selector else ()
        found = json.loads(self.kubectl("get", kind, *options, "-o", "json"))
        items: list[Json] = found["items"]
        return items

    def exists(self, kind: str, name: str) -> bool:
        return bool(self.kubectl("get", kind, name, "--ignore-not-found", "-o", "name").strip())

    def patch(self, kind: str, name: str, body: Json) -> None:
        """A JSON merge patch."""
        self.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps(body))

    def annotate(self, kind: str, name: str, annotation: str) -> None:
        self.kubectl("annotate", "--overwrite", kind, name, annotation)

    # --- graphs

    def pods(self, graph: str, component: str = "", ending: bool = False) -> list[Json]:
        """Pods of a graph, of one of its components; without those that are about to end."""
        selector = f"{GRAPH_LABEL}={graph}"
        if component:
            selector += f",{COMPONENT_LABEL}={component}"
        return [
            pod
            for pod in self.list("pods", selector)
            if ending or "deletionTimestamp" not in pod["metadata"]
        ]

    def url(self, graph: str, component: str = "frontend") -> str:
        """Of a component's Service."""
        service = self.get("service", f"{graph}-{component}")
        port = service["spec"]["ports"][0]["port"]
        if self.cluster.is_foreign:
            return self._tunnel(f"service/{service['metadata']['name']}", port)
        return f"http://{service['spec']['clusterIP']}:{port}"

    def pod_url(self, pod: Json, port: int) -> str:
        """Of a pod."""
        if self.cluster.is_foreign:
            return self._tunnel(f"pod/{pod['metadata']['name']}", port)
        return f"http://{pod['status']['podIP']}:{port}"

    def _tunnel(self, target: str, port: int) -> str:
        if (target, port) not in self._tunnels:
            self._tunnels[target, port] = Tunnel(self.cluster, self.name, target, port)
        return f"http://{self._tunnels[target, port].address}"

    def condition(self, graph: str, type: str) -> Json:
        """A condition of a graph; {} if it has none of this type for its current generation."""
        return condition(self.get("dgd", graph), type)

    def columns(self, graph: str) -> dict[str, str]:
        """The line of `kubectl get dgd`, by its headings."""
        head, line = self.kubectl("get", "dgd", graph).splitlines()
        starts = [head.index(word) for word in head.split()]
        ends = [*starts[1:], None]
        return {
            head[start:end].strip(): line[start:end].strip()
            for start, end in zip(starts, ends, strict=True)
        }

    def wait_ready(self, graph: str, timeout: float = START_S) -> None:
        """Until the graph's current generation is Ready."""

        def now() -> bool:
            return condition(self.get("dgd", graph), "Ready").get("status") == "True"

        self.until(now, f"{graph} Ready", timeout, lambda: self.story(graph))

    def story(self, graph: str) -> str:
        """What there is of a graph, for people."""
        parts = [
            self.kubectl("get", "dgd,deploy,pods", "-o", "wide", check=False),
            self.kubectl("get", "dgd", graph, "-o", "jsonpath={.status}", check=False),
            self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-4000:],
        ]
        for pod in self.pods(graph, ending=True):
            name = pod["metadata"]["name"]
            parts.append(f"--- {name}\n{self.kubectl('logs', name, '--tail=15', check=False)}")
        return "\n".join(parts)

    # --- waiting

    def until(
        self,
        happened: Callable[[], T],
        what: str,
        timeout: float = START_S,
        explain: Callable[[], str] = lambda: "",
    ) -> T:
        """What `happened` gives once it is true. kubectl's errors count as not yet."""
        deadline = time.monotonic() + timeout
        said = ""
        while True:
            try:
                if found := happened():
                    return found
            except (KubectlError, subprocess.TimeoutExpired) as error:
                said = str(error)
            if time.monotonic() > deadline:
                raise Late(f"{what}: not within {timeout:g} s; {said}\n{explain()}")
            time.sleep(POLL_S)

    # --- itself

    def create(self) -> None:
        """Returns when it has what every namespace gets."""
        self.cluster.kubectl("create", "namespace", self.name)
        for kind, name in (("serviceaccount", "default"), ("configmap", "kube-root-ca.crt")):
            self.until(lambda kind=kind, name=name: self.exists(kind, name), f"{kind} {name}")

    def delete(self) -> None:
        """With everything in it; graphs first, so that nothing makes its parts again."""
        for tunnel in self._tunnels.values():
            tunnel.close()
        for kind in ("dgd", "hpa"):
            self.kubectl("delete", kind, "--all", "--wait=false", check=False)
        self.cluster.remove_namespace(self.name)


def condition(graph: Json, type: str) -> Json:
    """A graph's condition of its current generation, else {}."""
    for found in (graph.get("status") or {}).get("conditions") or ():
        current = found.get("observedGeneration") == graph["metadata"]["generation"]
        if found["type"] == type and current:
            entry: Json = found
            return entry
    return {}


def uids(pods: list[Json]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


def is_ready(pod: Json) -> bool:
    """Whether the pod itself says so."""
    conditions: Iterator[Json] = iter((pod.get("status") or {}).get("conditions") or ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
