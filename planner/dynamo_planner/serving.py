"""The planner as a process: look, decide, order, tell, and again after the interval.

A look that can't be made decides nothing: where nobody knows the scales or the workers, readiness,
log and a metric say so, and what runs keeps running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import BinaryIO

from dynamo_runtime.kubernetes.access import NoCluster
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient
from dynamo_runtime.lifecycle import Lifecycle
from dynamo_runtime.status import AddressInUse, StatusServer
from prometheus_client import CollectorRegistry

from dynamo_planner.config import GivenConfig
from dynamo_planner.connectors import (
    Connector,
    InvalidComponents,
    LocalScaleApi,
    ScaleConnector,
    scalables,
)
from dynamo_planner.constrain import infeasible
from dynamo_planner.decision import Decision, RoleDecision
from dynamo_planner.execute import Applied
from dynamo_planner.fleet import Component, Fleet
from dynamo_planner.metrics import PlannerMetrics
from dynamo_planner.record import Head, Look, head_line, look_line
from dynamo_planner.settings import Settings
from dynamo_planner.sources import (
    DirectScrape,
    MetricsSource,
    Misconfigured,
    Prometheus,
    PrometheusSource,
    Workers,
    endpoint_source,
)
from dynamo_planner.state import Inputs, State
from dynamo_planner.status_routes import Journal, Told
from dynamo_planner.step import scaled, step

log = logging.getLogger(__name__)

NOTHING_TO_SCALE = (
    "there is nothing to scale: no worker of the graph has a scalingAdapter "
    "(DYN_PLANNER_COMPONENTS is empty); give those that are to be scaled scalingAdapter: {}"
)


class Planner:
    """The loop. ``look`` is one turn; ``run`` makes them until it is cancelled."""

    def __init__(
        self,
        given: GivenConfig,
        state: State,
        workers: Workers,
        source: MetricsSource,
        connector: Connector,
        lifecycle: Lifecycle,
        metrics: PlannerMetrics,
        *,
        recording: BinaryIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = given.config
        self.state = state
        self.journal = Journal(given.config.model_dump(mode="json"), given.notes)
        self._workers = workers
        self._source = source
        self._connector = connector
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._recording = recording
        self._clock = clock
        self._applied: tuple[Applied, ...] = ()
        self._said: dict[str, tuple[object, ...]] = {}  # role -> what was logged of it last
        self._problem = ""
        metrics.targets(given.config)
        if recording is not None:
            recording.write(head_line(Head.of(given.config, state)))
            recording.flush()

    async def run(self) -> None:
        """A look every ``load_adjustment_interval_seconds``; a late one delays those after it."""
        due = self._clock()
        while True:
            self._metrics.lag.set(max(0.0, self._clock() - due))
            with self._metrics.duration.time():
                await self.look()
            due = max(due + self.config.load_adjustment_interval_seconds, self._clock())
            await asyncio.sleep(due - self._clock())

    async def look(self) -> Decision | None:
        """One look, its orders carried out; None if it could not be made."""
        try:
            desired = await self._connector.desired()
        except ApiError as error:
            self._blocked(f"the scales can't be read: {error}")
            return None
        readings = await self._source.readings()
        if self._workers.problem:
            self._blocked(self._workers.problem)
            return None
        if not desired:
            self._blocked(NOTHING_TO_SCALE)
            return None
        inputs = Inputs(self._clock(), self._fleet(desired), readings, self._applied)
        # Beside the loop: a forecast may take a second.
        state, decision = await asyncio.to_thread(step, self.state, inputs, self.config)
        self.state = state
        self._tell(inputs, decision)
        applied = [await self._carry_out(each.component, each.replicas) for each in decision.orders]
        self._applied = tuple(applied)
        if decision.blind:
            blind = next(r for r in decision.roles if r.observed.ready and not r.observed.seen)
            self._blocked(f"{blind.role}: {blind.reason}")
        elif decision.missing:
            roles = " and ".join(decision.missing)
            self._blocked(
                f"mode {self.config.mode} scales {roles} workers, and no component of the graph "
                "with a scalingAdapter is one"
            )
        else:
            self._works()
        return decision

    def _fleet(self, desired: Mapping[str, int]) -> Fleet:
        fleet = []
        for each in self._connector.components:
            pods = self._workers.pods(each.name)
            fleet.append(
                Component(
                    each.name,
                    each.role,
                    desired[each.name],
                    ready=pods.ready,
                    terminating=pods.terminating,
                    gpus=each.gpus,
                )
            )
        return tuple(fleet)

    async def _carry_out(self, component: str, replicas: int) -> Applied:
        try:
            await self._connector.scale(component, replicas)
        except ApiError as error:
            self._metrics.orders.labels("failed").inc()
            log.error("%s could not be scaled to %d: %s", component, replicas, error)
            return Applied(component, replicas, str(error))
        self._metrics.orders.labels("taken").inc()
        return Applied(component, replicas)

    # --- telling

    def _tell(self, inputs: Inputs, decision: Decision) -> None:
        wall = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.journal.told.append(Told(wall, decision))
        self._metrics.show(decision)
        self._metrics.show_engines(inputs.readings)
        if self._recording is not None:
            self._recording.write(look_line(Look(inputs, decision, wall)))
            self._recording.flush()
        for role in decision.roles:
            self._log(role, decision)

    def _log(self, role: RoleDecision, decision: Decision) -> None:
        """What moved, and once what holds; figures alone are no news."""
        what = (role.replicas, role.held, role.load_state, role.throughput_state)
        if what == self._said.get(role.role) and role.replicas == role.desired:
            return
        self._said[role.role] = what
        keeps = role.replicas == role.desired
        moved = f"keeps {role.desired}" if keeps else f"{role.desired} → {role.replicas}"
        suffix = " (advisory: nothing is ordered)" if decision.advisory else ""
        fields = {"role": role.role, "replicas": role.replicas, "limits": decision.limits}
        log.info("%s: %s: %s%s", role.role, moved, role.reason, suffix, extra={"fields": fields})

    def _blocked(self, why: str) -> None:
        self._metrics.problem.set(1)
        if not self._problem:
            log.error("nothing can be decided: %s", why)
        self._problem = why
        self._lifecycle.set_not_ready(why)

    def _works(self) -> None:
        self._metrics.problem.set(0)
        if self._problem:
            log.info("deciding again")
        self._problem = ""
        self._lifecycle.set_ready()


async def run_planner(
    settings: Settings, given: GivenConfig, state: State, lifecycle: Lifecycle
) -> int:
    """Serve until ``lifecycle.stop_requested``; the exit status.

    What prevents the start is one line in the log and status 1.
    """
    try:
        async with contextlib.AsyncExitStack() as stack:
            await _serve(settings, given, state, lifecycle, stack)
    except (AddressInUse, NoCluster, OSError, Misconfigured, InvalidComponents) as error:
        log.error("%s", error)
        return 1
    return 0


async def _serve(
    settings: Settings,
    given: GivenConfig,
    state: State,
    lifecycle: Lifecycle,
    stack: contextlib.AsyncExitStack,
) -> None:
    registry = CollectorRegistry()
    metrics = PlannerMetrics(registry)
    workers = _workers(settings)
    source = _source(settings, given, workers)
    connector = await _connector(settings, stack)
    _check(given, connector)
    recording = stack.enter_context(settings.record.open("wb")) if settings.record else None
    planner = Planner(
        given, state, workers, source, connector, lifecycle, metrics, recording=recording
    )
    servers = [StatusServer(lifecycle, registry, settings.host, settings.status_port)]
    planner.journal.add_routes(servers[0].app)
    if settings.metrics_port:
        servers.append(StatusServer(lifecycle, registry, settings.host, settings.metrics_port))
    lifecycle.set_not_ready("the workers have not been looked at yet")
    for server in servers:
        await server.start()
        stack.push_async_callback(server.stop)
    names = ", ".join(f"{each.name} ({each.role})" for each in connector.components) or "nothing"
    advisory = ", advisory" if given.config.advisory else ""
    log.info("scaling %s by %s%s", names, given.config.optimization_target, advisory)
    for note in given.notes:
        log.info("%s", note)
    working = [asyncio.create_task(workers.run()), asyncio.create_task(planner.run())]
    stopping = asyncio.create_task(_until(lifecycle.stop_requested))
    try:
        await asyncio.wait({*working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in working:
            if task.done():
                task.result()
    finally:
        for task in (*working, stopping):
            task.cancel()
        await asyncio.gather(*working, stopping, return_exceptions=True)


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def _check(given: GivenConfig, connector: Connector) -> None:
    """Raises ``Misconfigured`` for limits that these components can't keep."""
    components = (
        Component(each.name, each.role, 0, gpus=each.gpus) for each in connector.components
    )
    fleet = scaled(tuple(components), given.config)
    if fleet and (problems := list(infeasible(fleet, given.config))):
        raise Misconfigured("; ".join(problems))


def _workers(settings: Settings) -> Workers:
    def told(problem: str) -> None:
        workers.registry_problem = problem

    workers = Workers(
        endpoint_source(
            settings.discovery,
            file=settings.endpoints_file,
            graph=settings.graph,
            namespace=settings.namespace,
            on_problem=told,
        )
    )
    return workers


def _source(settings: Settings, given: GivenConfig, workers: Workers) -> MetricsSource:
    config = given.config
    if config.metric_pulling_prometheus_endpoint:
        log.info("asking Prometheus at %s", config.metric_pulling_prometheus_endpoint)
        # On one machine no pod has a namespace that Prometheus could know.
        namespace = settings.namespace if settings.discovery == "kubernetes" else ""
        return PrometheusSource(workers, Prometheus.of(config), namespace=namespace)
    timeout = min(2.0, config.load_adjustment_interval_seconds / 2)
    return DirectScrape(workers, timeout_s=timeout)


async def _connector(settings: Settings, stack: contextlib.AsyncExitStack) -> ScaleConnector:
    components = scalables(settings.components or "[]")
    if settings.scale_socket:
        local = LocalScaleApi(settings.scale_socket)
        stack.push_async_callback(local.close)
        return ScaleConnector(local, settings.namespace, components)
    client = await KubernetesClient.from_environment(user_agent="dynamo-planner")
    stack.push_async_callback(client.close)
    return ScaleConnector(client, settings.namespace, components)
