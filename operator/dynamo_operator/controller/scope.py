"""Which namespaces an operator takes care of, so that each graph has exactly one master.

A restricted operator marks its namespaces with a Lease; a cluster-wide one leaves alone what is
marked, and takes over when a mark has not been renewed for as long as it says. Source: Dynamo's
operator, whose marker has this name.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Iterable

from dynamo_runtime.kubernetes.client import ApiError, Json, KubernetesClient
from dynamo_runtime.kubernetes.lease import Observation, expired, keep_lease, observe

from dynamo_operator.marker import DURATION_S, MARKER, RENEW_S

log = logging.getLogger(__name__)

SETTLE_S = 3.0
"""A restricted operator begins so long after its marker stands, so that a cluster-wide one has seen
it; what that had in hand ends with its next write (`NotOurs`)."""
LOOK_EVERY_S = 1.0


class NotOurs(Exception):
    """The namespace is another operator's, perhaps since a moment ago: nothing is written there."""


class MarkedNamespaces:
    """The namespaces that restricted operators hold, for a cluster-wide one."""

    def __init__(
        self,
        clock: Callable[[], float],
        read: Callable[[str], Awaitable[Json | None]],
        on_change: Callable[[str], None],
    ) -> None:
        """`read` asks the API server for a namespace's marker (None: there is none; `ApiError`: it
        can't tell). `on_change` is called with each namespace whose marker came or went."""
        self._clock = clock
        self._read = read
        self._on_change = on_change
        self._seen: dict[str, Observation] = {}
        self.marked: frozenset[str] = frozenset()

    def lease_changed(self, old: Json | None, new: Json | None) -> None:
        """A marker was seen (an informer's `on_change`)."""
        lease = new or old
        assert lease is not None
        namespace = lease["metadata"]["namespace"]
        now = self._clock()
        if new is None:
            self._seen.pop(namespace, None)
            self._free(namespace)
            return
        seen = self._seen[namespace] = observe(self._seen.get(namespace), new, now)
        if not new["spec"].get("holderIdentity"):
            self._free(namespace)
        elif seen.at == now and namespace not in self.marked:
            log.info("namespace %s is a restricted operator's", namespace)
            self.marked |= {namespace}
            self._on_change(namespace)

    async def look(self) -> None:
        """Take account of the time: markers expire. That nothing is heard of one may be the fault
        of a watch, so the API server is asked before a namespace is taken."""
        for namespace in sorted(self.marked):
            seen = self._seen[namespace]
            if not expired(seen.lease, seen.at, self._clock()):
                continue
            try:
                lease = await self._read(namespace)
            except ApiError as error:
                log.debug("whether namespace %s is marked is unknown: %s", namespace, error)
                continue
            if namespace not in self.marked:
                continue  # was taken away meanwhile
            seen = self._seen[namespace] = observe(self._seen[namespace], lease, self._clock())
            if expired(seen.lease, seen.at, self._clock()):
                self._free(namespace)

    def _free(self, namespace: str) -> None:
        if namespace in self.marked:
            log.info("namespace %s is ours again", namespace)
            self.marked -= {namespace}
            self._on_change(namespace)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()


class OwnMarkers:
    """The markers of a restricted operator, and where they stand: where one does not, a
    cluster-wide operator may be at work."""

    def __init__(
        self,
        namespaces: Iterable[str],
        clock: Callable[[], float],
        on_standing: Callable[[str], None],
    ) -> None:
        """`on_standing` is called with each namespace that has become ours."""
        self._clock = clock
        self._on_standing = on_standing
        # namespace -> since when its marker has stood without a gap, when what renewed it last was
        # sent
        self._stood: dict[str, tuple[float, float]] = {}
        self._namespaces = tuple(namespaces)

    def stands(self, namespace: str) -> bool:
        """Whether the namespace is ours: marked for long enough that others have seen it, and not
        for so long without renewal that they may have taken it over."""
        now = self._clock()
        since, renewed = self._stood.get(namespace, (math.inf, -math.inf))
        return now - since >= SETTLE_S and now - renewed < DURATION_S

    def renewed(self, namespace: str, sent: float) -> bool:
        """The marker was written by a request `sent` then; whether that begins a new time of
        standing. Others may have seen it as soon as it was sent, so it lasts from then."""
        now = self._clock()
        since, last = self._stood.get(namespace, (now, -math.inf))
        fresh = now - last >= DURATION_S
        self._stood[namespace] = (now if fresh else since, sent)
        return fresh

    async def keep(self, client: KubernetesClient, identity: str) -> None:
        """Keep the markers until cancelled."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                group.create_task(
                    keep_lease(
                        client,
                        namespace,
                        MARKER,
                        identity,
                        duration_s=DURATION_S,
                        renew_s=RENEW_S,
                        on_renewed=functools.partial(self._on_renewed, namespace),
                        clock=self._clock,
                    )
                )

    def _on_renewed(self, namespace: str, sent: float) -> None:
        if self.renewed(namespace, sent):
            self._announce(namespace)

    def _announce(self, namespace: str) -> None:
        """Tell that the namespace is ours, once it is. A loop's timers count from when its turn
        began, and so may fire early: who is told then would find that it is not ours."""
        since, _ = self._stood[namespace]
        left = since + SETTLE_S - self._clock()
        if left > 0:
            asyncio.get_running_loop().call_later(left, self._announce, namespace)
        else:
            self._on_standing(namespace)
