"""What tests of gateways do in their namespace while requests go on."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.request import Request

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from e2e.cluster import Cluster
from e2e.cluster.progress import wait_for
from e2e.gateway.pools import STATUS_PORT
from e2e.gateway.traffic import PATH

START_S, CHANGE_S = 90.0, 60.0
KILL = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if FLAG in (process / "cmdline").read_bytes().split(bytes(1)):
        os.kill(int(process.name), signal.SIGKILL)
"""


class Space:
    """What a test does in its namespace, without keeping the requests under way from running."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    async def kubectl(self, *arguments: str) -> str:
        done = await asyncio.to_thread(self.cluster.kubectl, "-n", self.name, *arguments)
        return done.stdout

    async def kill(self, pod: str, flag: str, when: str = "") -> None:
        """SIGKILL for the processes of a pod that were started with `flag`; `when`: Python code
        that runs there before."""
        code = f"{when}\nFLAG = {flag.encode()!r}\n{KILL}"
        await self.kubectl("exec", pod, "--", "python", "-c", code)

    def addresses(self, value: str, label: str = "app") -> dict[str, str]:
        """Pods with this label that do not end -> address, once it is known."""
        found = self.cluster.get("pods", "-n", self.name, "-l", f"{label}={value}")["items"]
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

    async def answering(self, url: str, host: str = "", model: str = "tiny") -> None:
        """Wait until the gateway at `url` answers requests for `host`: it knows pods by then."""
        body = json.dumps({"model": model, "prompt": "ready?", "max_tokens": 1}).encode()
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
        self, *manifests: Any, deployments: tuple[str, ...] = (), timeout: float = START_S
    ) -> None:
        """Apply manifests and wait until these Deployments are available."""
        self.cluster.apply(manifests, self.name)
        for name in deployments:
            self.cluster.wait_deployment(name, self.name, timeout)


async def samples(address: str, port: int = STATUS_PORT) -> list[Sample]:
    """What a pod's page of metrics says at this moment."""
    url = f"http://{address}:{port}/metrics"
    async with aiohttp.ClientSession() as client, client.get(url) as response:
        page = await response.text()
    return [one for family in text_string_to_metric_families(page) for one in family.samples]


async def asked(address: str) -> float:
    """Decisions that a picker has made since it began; -1 while nobody answers there."""
    name = "dynamo_epp_decisions_total"
    try:
        return sum(one.value for one in await samples(address) if one.name == name)
    except aiohttp.ClientConnectionError:
        return -1


async def until(
    predicate: Callable[[], object], what: str, told: Callable[[], object] = lambda: ""
) -> None:
    """Until it is true; asked off the loop, where traffic goes on."""
    await asyncio.to_thread(wait_for, what, predicate, CHANGE_S, 0.1, lambda: str(told()))


async def eventually(holds: Callable[[], Awaitable[object]], what: str) -> None:
    """The same of what is asked on the loop."""
    deadline = time.monotonic() + CHANGE_S
    while not await holds():
        assert time.monotonic() < deadline, f"{what}: not within {CHANGE_S:g} s"
        await asyncio.sleep(0.1)
