"""Which workers there are, kept current: what every source of readings begins with."""

from __future__ import annotations

import asyncio

from dynamo_runtime.discovery import Endpoint, EndpointSource
from dynamo_runtime.kubernetes.labels import COMPONENT

from dynamo_planner.observe import Reading
from dynamo_planner.observe.page import Figures
from dynamo_planner.sources.source import Pods

ASK_AGAIN_S = 1.0


class Workers:
    """The endpoints of ``source``; ``run`` follows them until it is cancelled."""

    def __init__(self, source: EndpointSource) -> None:
        self._source = source
        self._endpoints: tuple[Endpoint, ...] | None = None
        self.registry_problem = ""
        """Why the registry can't be asked, as its source tells; the last list stays in force."""

    @property
    def problem(self) -> str:
        """Why nobody knows which workers there are; "" if somebody does."""
        if self._endpoints is None:
            return self.registry_problem or "nobody has told yet which workers there are"
        return self.registry_problem

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return self._endpoints or ()

    async def run(self) -> None:
        while True:
            async for snapshot in self._source.snapshots():
                self._endpoints = snapshot
            await asyncio.sleep(ASK_AGAIN_S)

    def pods(self, component: str) -> Pods:
        ready = terminating = 0
        for endpoint in self.endpoints:
            if endpoint.labels.get(COMPONENT) == component:
                terminating += endpoint.terminating
                ready += endpoint.ready and not endpoint.terminating
        return Pods(ready, terminating)


def reading(
    endpoint: Endpoint,
    figures: Figures | None,
    age_s: float | None,
    context_tokens: float | None = None,
) -> Reading:
    """What ``endpoint`` told ``age_s`` seconds ago; None: it never told anything."""
    known = figures or Figures()
    return Reading(
        worker=endpoint.name,
        component=endpoint.labels.get(COMPONENT, ""),
        ready=endpoint.ready,
        terminating=endpoint.terminating,
        age_s=age_s if figures is not None else None,
        running=known.running,
        waiting=known.waiting,
        kv_usage=known.kv_usage,
        kv_tokens=known.kv_tokens,
        queued_tokens=known.queued_tokens,
        context_tokens=context_tokens,
        counters=known.counters,
    )
