"""What runs in an operator's process, from the first connection to the last write."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

from dynamo_runtime.kubernetes import lease, resources
from dynamo_runtime.kubernetes.access import NoCluster
from dynamo_runtime.kubernetes.client import ApiError, ApiUnreachable, Json, KubernetesClient
from dynamo_runtime.kubernetes.informer import Informers
from dynamo_runtime.kubernetes.lease import LeaderLease, LeaseLost
from dynamo_runtime.kubernetes.resources import Resource
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import AddressInUse, StatusServer
from prometheus_client import CollectorRegistry

from dynamo_operator.controller import scope
from dynamo_operator.controller.apis import ServedApis, group_kind
from dynamo_operator.controller.crds import OwnCrds
from dynamo_operator.controller.metrics import GRAPH, OperatorMetrics
from dynamo_operator.controller.reconciler import NotInOrder, Reconciler
from dynamo_operator.controller.settings import OperatorSettings
from dynamo_operator.install.crds import ForeignCrds
from dynamo_operator.marker import MARKER
from dynamo_operator.reconcile import gather
from dynamo_operator.reconcile.gather import GraphIndex, GraphKey
from dynamo_operator.reconcile.queue import Closed, WorkQueue
from dynamo_operator.render import Platform, names

log = logging.getLogger(__name__)

LEADER_LEASE = "dynamo-operator"
GAUGES_EVERY_S = 5.0
STALE_S = 600.0
"""A cache that was silent for so long makes the process unfit: its watch is dead."""
RECONCILE_LIMIT_S = 120.0
"""One reconcile may take so long; then it counts as failed."""
FINISH_S = 10.0
"""What is in hand when the process is told to stop gets so long to end."""
RETRY_S = 2.0
OPTIONAL_SYNC_S = 15.0
"""Caches of optional kinds may take so long to fill before work begins without them: their objects
are then looked up one by one."""


async def run_operator(settings: OperatorSettings, lifecycle: Lifecycle) -> int:
    """Run until told to stop. Exit status 0: stopped on request; 1: no start, or no leader now."""
    registry = CollectorRegistry()
    metrics = OperatorMetrics(registry)
    status = StatusServer(lifecycle, registry, settings.status_host, settings.status_port)
    pod = os.environ.get("POD_NAME", "") or os.uname().nodename
    identity = settings.identity or f"{pod}_{secrets.token_hex(4)}"
    try:
        client = await KubernetesClient.from_environment(
            kubeconfig=settings.kubeconfig,
            user_agent="dynamo-operator",
            on_request=metrics.on_request,
        )
    except NoCluster as error:
        log.error("%s", error)
        return 1
    lease_client = await KubernetesClient.from_environment(
        kubeconfig=settings.kubeconfig, user_agent="dynamo-operator-lease"
    )
    try:
        await status.start()
        operator = Operator(settings, lifecycle, client, lease_client, metrics, identity)
        return await operator.run()
    except AddressInUse as error:
        log.error("%s", error)
        return 1
    finally:
        await status.stop()
        await client.close()
        await lease_client.close()


class Operator:
    """The parts of one operator process. `run` is called once."""

    def __init__(
        self,
        settings: OperatorSettings,
        lifecycle: Lifecycle,
        client: KubernetesClient,
        lease_client: KubernetesClient,
        metrics: OperatorMetrics,
        identity: str,
    ) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._client = client
        self._metrics = metrics
        self._identity = identity
        self._rng = random.Random()
        self._queue: WorkQueue[GraphKey] = WorkQueue(
            clock=time.monotonic,
            rng=self._rng,
            share=lambda key: key[0],
            most=max(1, settings.workers // 2) if len(settings.namespaces) != 1 else None,
        )
        self._index = GraphIndex(self._queue.add)
        self._markers = scope.OwnMarkers(settings.namespaces, time.monotonic, self._all_due)
        self._reconciler = Reconciler(
            client, self._index, platform=self._platform, identity=identity
        )
        scale = settings.lease_seconds / lease.DURATION_S
        self._lease = LeaderLease(
            lease_client,
            settings.namespace or client.namespace,
            LEADER_LEASE,
            identity,
            duration_s=settings.lease_seconds,
            renew_within_s=lease.RENEW_WITHIN_S * scale,
            renew_every_s=lease.RETRY_S * scale,
            rng=self._rng,
        )
        self._lease_client = lease_client
        client.fence = self._check_mastery
        self._marked = scope.MarkedNamespaces(time.monotonic, self._marker, self._all_due)
        self._apis = ServedApis(
            client, gather.OPTIONAL_CHILDREN, self._apis_changed, settings.discovery_seconds
        )
        self._crds = OwnCrds(client, settings.discovery_seconds)
        self._optional: dict[Resource, tuple[Informers, asyncio.Task[None]]] = {}
        self._registries: dict[tuple[str, str], Json] = {}
        self._leading = False
        self._caches = self._make_caches()

    async def run(self) -> int:
        lifecycle = self._lifecycle
        lifecycle.set_not_ready("filling the caches")
        stopping: asyncio.Task[Any] = asyncio.create_task(lifecycle.stop_requested.wait())
        background: list[asyncio.Task[None]] = [
            asyncio.create_task(task)
            for task in (
                self._caches.run(),
                self._keep_gauges(),
                self._marked.run(),
                self._crds.run(),
            )
        ]
        leading = asyncio.create_task(self._lead())
        try:
            await asyncio.wait(
                [stopping, leading, *background], return_when=asyncio.FIRST_COMPLETED
            )
            if stopping.done():
                self._queue.close()  # what is in hand may end
                await asyncio.wait([leading], timeout=FINISH_S)
            for task in (leading, *background):
                if task.done():
                    task.result()  # raises what ended it
            return 0
        except* LeaseLost as lost:
            log.error("%s: stopping, so that there is one leader only", _first(lost))
            return_code = 1
        except* ForeignCrds as foreign:
            log.error("%s", _first(foreign))
            return_code = 1
        finally:
            tasks = [stopping, leading, *background, *(task for _, task in self._optional.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Nothing is written any more: the next one may begin.
            if self._settings.leader_elect:
                await self._lease.release()
        return return_code

    # --- caches

    def _make_caches(self) -> Informers:
        settings, index = self._settings, self._index
        namespaces = sorted(settings.namespaces) if settings.restricted else None
        caches = Informers(self._client, namespaces=namespaces, rng=self._rng)
        ours = f"{names.MANAGED_BY_LABEL}={names.MANAGED_BY}"
        for kind in gather.CHILDREN:
            caches.add(
                kind,
                label_selector=ours,
                transform=gather.child,
                on_change=index.child_changed,
                on_list=self._listed,
            )
        caches.add(
            resources.PODS,
            label_selector=names.GRAPH_LABEL,
            transform=gather.pod,
            on_change=index.pod_changed,
        )
        if not settings.restricted:
            caches.add(
                resources.LEASES,
                field_selector=f"metadata.name={MARKER}",
                on_change=self._marked.lease_changed,
            )
        caches.add(resources.GRAPHS, transform=gather.graph, on_change=index.graph_changed)
        return caches

    def _apis_changed(self, served: frozenset[str]) -> None:
        """Follow kinds that have come, and forget those that have gone."""
        namespaces = sorted(self._settings.namespaces) if self._settings.restricted else None
        for kind in gather.OPTIONAL_CHILDREN:
            if group_kind(kind) in served and kind not in self._optional:
                caches = Informers(self._client, namespaces=namespaces, rng=self._rng)
                caches.add(
                    kind,
                    label_selector=f"{names.MANAGED_BY_LABEL}={names.MANAGED_BY}",
                    transform=gather.child,
                    on_change=self._index.child_changed,
                    on_list=self._listed,
                )
                self._optional[kind] = caches, asyncio.create_task(caches.run())
            elif group_kind(kind) not in served and kind in self._optional:
                caches, task = self._optional.pop(kind)
                task.cancel()
                for item in list(caches.objects(kind)):
                    self._index.child_changed(item, None)
        for graph in self._index.graphs:
            self._queue.add((graph["metadata"]["namespace"], graph["metadata"]["name"]))

    def _listed(self, kind: Resource, namespace: str | None, version: str) -> None:
        self._index.listed(kind.kind, namespace, version)

    def _pull_secrets(self) -> Informers:
        self._registries.clear()  # what went while nobody looked is not told
        caches = Informers(
            self._client, namespaces=self._settings.pull_secret_namespaces, rng=self._rng
        )
        caches.add(
            resources.SECRETS,
            field_selector="type=kubernetes.io/dockerconfigjson",
            transform=gather.docker_secret,
            on_change=self._secret_changed,
        )
        return caches

    def _secret_changed(self, old: Json | None, new: Json | None) -> None:
        item = new or old
        assert item is not None
        place = item["metadata"]["namespace"], item["metadata"]["name"]
        self._registries.pop(place, None)
        if new is not None:
            self._registries[place] = new
        self._all_due(place[0])

    def _platform(self, namespace: str) -> Platform:
        by_registry: dict[str, list[str]] = {}
        for (where, name), secret in sorted(self._registries.items()):
            if where == namespace:
                for host in secret["registries"]:
                    by_registry.setdefault(host, []).append(name)
        return replace(
            self._settings.platform,
            namespace=namespace,
            apis=self._apis.served,
            pull_secrets_by_registry={k: tuple(v) for k, v in by_registry.items()},
        )

    # --- whose graphs

    async def _marker(self, namespace: str) -> Json | None:
        try:
            return await self._client.get(resources.LEASES.path(namespace, MARKER))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def _all_due(self, namespace: str) -> None:
        """Every graph of the namespace is due: its master has changed."""
        for graph in self._index.graphs:
            metadata = graph["metadata"]
            if metadata["namespace"] == namespace:
                self._queue.add((namespace, metadata["name"]))

    def _is_ours(self, namespace: str) -> bool:
        if self._settings.restricted:
            return self._markers.stands(namespace)
        return namespace not in self._marked.marked

    def _check_mastery(self, namespace: str) -> None:
        """For the very moment of a write: raises `LeaseLost`, or `NotOurs` if another operator has
        come since the reconcile began, which may hang for minutes behind a webhook."""
        if self._settings.leader_elect:
            self._lease.check()
        if namespace and not self._is_ours(namespace):
            raise scope.NotOurs(f"namespace {namespace} is another operator's")

    # --- leading

    async def _lead(self) -> None:
        """Wait for the lease and reconcile. Ends when the queue is closed, by `LeaseLost`, or by
        `ForeignCrds`."""
        await self._answered(self._crds.look)
        await self._answered(self._apis.look)
        await self._caches.synced()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPTIONAL_SYNC_S):
                for caches, _ in self._optional.values():
                    await caches.synced()
        log.info("caches are filled: %d graphs", len(list(self._index.graphs)))
        self._lifecycle.set_ready()
        leader = self._metrics.leader.labels(LEADER_LEASE)
        leader.set(0)
        while True:
            if self._settings.leader_elect:
                await self._lease.acquire()
            leader.set(1)
            self._leading = True
            try:
                return await self._work_while_leading()
            except* LeaseLost as lost:
                taken, _ = lost.split(lambda error: isinstance(error, LeaseLost) and error.taken)
                if taken is not None:
                    raise taken from None
                # Nobody has it, as far as is known: the API server is away, perhaps.
                log.warning("%s: nothing is written until it is held again", _first(lost))
            finally:
                leader.set(0)
                self._leading = False

    async def _work_while_leading(self) -> None:
        settings = self._settings
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._apis.run())]
            if settings.leader_elect:
                # Renewed from the beginning: lists of a large cluster take longer than a lease.
                beside.append(group.create_task(self._lease.hold()))
                await self._refresh()
            # What ended the leader before, perhaps.
            await self._answered(self._crds.look)
            if settings.restricted:
                beside.append(
                    group.create_task(self._markers.keep(self._lease_client, self._identity))
                )
            if settings.pull_secret_namespaces:
                secrets = self._pull_secrets()
                beside.append(group.create_task(secrets.run()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(OPTIONAL_SYNC_S):
                        await secrets.synced()
            async with asyncio.TaskGroup() as workers:
                for _ in range(settings.workers):
                    workers.create_task(self._work())
            for task in beside:
                task.cancel()

    async def _refresh(self) -> None:
        """List everything anew: a watch may have hung unnoticed while another led and wrote."""
        await self._caches.refresh()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPTIONAL_SYNC_S):
                for caches, _ in list(self._optional.values()):
                    await caches.refresh()

    async def _answered(self, look: Callable[[], Awaitable[None]]) -> None:
        """Look until the API server has answered."""
        while True:
            try:
                await look()
                return
            except ApiError as error:
                self._lifecycle.set_not_ready(f"the API server can't be asked: {error}")
                log.warning("the API server can't be asked: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _work(self) -> None:
        with contextlib.suppress(Closed):
            while True:
                await self._reconcile(await self._queue.get())

    async def _reconcile(self, key: GraphKey) -> None:
        if not self._is_ours(key[0]):
            self._queue.done(key)
            return
        began = time.monotonic()
        result, writes, again_after = "cancelled", 0, None
        try:
            async with asyncio.timeout(RECONCILE_LIMIT_S):
                done = await self._reconciler.reconcile(key)
            result, writes, again_after = "success", done.writes, done.look_again_s
        except NotInOrder as error:
            result, writes = "requeue", error.writes
            log.warning("%s/%s: %s", *key, error)
        except (ApiError, TimeoutError) as error:
            result = "error"
            unanswered = isinstance(error, ApiUnreachable | TimeoutError)
            level = logging.WARNING if unanswered else logging.ERROR
            log.log(level, "%s/%s: %s", *key, error or "took too long")
        except scope.NotOurs as error:
            result = "yielded"
            log.info("%s/%s: %s", *key, error)
        except LeaseLost:
            raise  # no fault of the graph's
        except Exception:
            result = "error"
            log.exception("%s/%s could not be reconciled", *key)
        finally:
            failed = result not in ("success", "yielded")
            self._queue.done(key, failed=failed, again_after=again_after)
            self._metrics.reconciles.labels(GRAPH, result).inc()
            self._metrics.seconds.labels(GRAPH, result).observe(time.monotonic() - began)
            self._metrics.writes.inc(writes)

    async def _keep_gauges(self) -> None:
        metrics = self._metrics
        while True:
            await asyncio.sleep(GAUGES_EVERY_S)
            metrics.depth.labels(GRAPH).set(len(self._queue) if self._leading else 0)
            metrics.failing.set(self._queue.failing)
            metrics.relists.set(sum(cache.relists for cache in self._caches))
            silence = time.monotonic() - self._caches.last_heard
            metrics.silence.set(silence)
            adapters = self._caches.objects(resources.ADAPTERS)
            metrics.count_resources(self._ruled(self._index.graphs), self._ruled(adapters))
            self._judge(silence)

    def _ruled(self, items: Iterable[Json]) -> list[Json]:
        """Those that this process takes care of: each object counts in one process, or in none."""
        if not self._leading:
            return []
        return [item for item in items if self._is_ours(item["metadata"]["namespace"])]

    def _judge(self, silence: float) -> None:
        """Ready means that the caches are filled and current."""
        problems = self._caches.problems
        if not all(cache.synced.is_set() for cache in self._caches):
            said = problems[0] if problems else "filling the caches"
            self._lifecycle.set_not_ready(self._crds.missing or said)
        elif silence > STALE_S:
            said = problems[0] if problems else f"a cache was silent for {silence:.0f} s"
            self._lifecycle.set_not_ready(said)
        else:
            self._lifecycle.set_ready()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that is not a group itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
