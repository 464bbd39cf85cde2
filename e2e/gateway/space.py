"""What tests of gateways do in their namespace while requests go on."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.request import Request

from e2e.cluster import Cluster
from e2e.cluster.progress import wait_for
from e2e.gateway.pools import STATUS_PORT
from e2e.gateway.traffic import PATH

START_S, CHANGE_S = 90.0, 60.0


class Space:
    """What a test does in its namespace, without keeping the requests under way from running."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    async def kubectl(self, *arguments: str) -> str:
        done = await asyncio.to_thread(self.cluster.kubectl, "-n", self.name, *arguments)
        return done.stdout

    def addresses(self, app: str) -> dict[str, str]:
        """Pods that do not end -> address, once it is known."""
        found = self.cluster.get("pods", "-n", self.name, "-l", f"app={app}")["items"]
        return {
            pod["metadata"]["name"]: pod["status"].get("podIP", "")
            for pod in found
            if not pod["metadata"].get("deletionTimestamp")
        }

    def url(self, service: str) -> str:
        found = self.cluster.get("service", service, "-n", self.name)
        return f"http://{found['spec']['clusterIP']}"

    def decisions(self, picker: str) -> list[Any]:
        """What the picker of this Deployment decided, the newest first."""
        (address,) = self.addresses(picker).values()
        url = f"http://{address}:{STATUS_PORT}/debug/decisions"
        with urllib.request.urlopen(url, timeout=10.0) as answer:
            found: list[Any] = json.load(answer)["decisions"]
        return found

    def pods(self, app: str) -> list[str]:
        """Names of the pods, those that end too."""
        found = self.cluster.get("pods", "-n", self.name, "-l", f"app={app}")["items"]
        return [pod["metadata"]["name"] for pod in found]

    async def answering(self, url: str, host: str = "") -> None:
        """Wait until the gateway at `url` answers requests for `host`: it knows pods by then."""
        body = json.dumps({"model": "tiny", "prompt": "ready?", "max_tokens": 1}).encode()
        headers = {"content-type": "application/json"} | ({"host": host} if host else {})

        def answers() -> bool:
            try:
                with urllib.request.urlopen(
                    Request(url + PATH, body, headers), timeout=10.0
                ) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        await until(answers, "the gateway answers")

    def start(
        self, *manifests: Any, deployments: tuple[str, ...], timeout: float = START_S
    ) -> None:
        """Apply manifests and wait until these Deployments are available."""
        self.cluster.apply(manifests, self.name)
        for name in deployments:
            self.cluster.wait_deployment(name, self.name, timeout)


async def until(
    predicate: Callable[[], object], what: str, told: Callable[[], object] = lambda: ""
) -> None:
    """Until it is true; asked off the loop, where traffic goes on."""
    await asyncio.to_thread(wait_for, what, predicate, CHANGE_S, 0.1, lambda: str(told()))
